"""Operations on one model in one folder: compress, evaluate, inspect, predict."""
