"""From a calibrated or trained model to one that runs on integer kernels."""

from attnpress.deployment.attention import AUTO, deploy, place_on, undeploy

__all__ = ["AUTO", "deploy", "place_on", "undeploy"]
