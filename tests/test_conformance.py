"""The kit, on the backends of this run."""

from graphkv.testing.suite import *  # noqa: F403
