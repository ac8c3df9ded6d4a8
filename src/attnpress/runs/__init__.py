"""What is done with one model in one folder: compress, evaluate, inspect, predict."""
