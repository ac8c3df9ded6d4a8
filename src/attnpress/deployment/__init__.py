"""Deployment: run a calibrated or trained model on integer kernels."""

from attnpress.deployment.attention import AUTO, deploy, place_on, undeploy

__all__ = ["AUTO", "deploy", "place_on", "undeploy"]
