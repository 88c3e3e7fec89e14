"""How many sockets a process of the pool may hold."""

import resource
from contextlib import suppress


def allow_many() -> int:
    """Raise this process's limit of open files to the highest that it may set; give the limit.

    A student has up to nine descriptors for each replica, and a replica two connections with each
    process that asks; many systems begin with a soft limit of 1,024 (`ulimit -n`) under a hard one
    that is far higher (`ulimit -Hn`).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # macOS names a hard limit that it does not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
