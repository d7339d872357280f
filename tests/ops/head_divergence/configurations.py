"""Random configurations of head_divergence."""

from tests.ops.attention.configurations import companion as configuration

__all__ = ["configuration"]
