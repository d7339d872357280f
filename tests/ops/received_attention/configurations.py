"""Random configurations of received_attention."""

from tests.ops.attention.configurations import companion as configuration

__all__ = ["configuration"]
