"""How many files this process may have open at once. The usual limit, 1,024, is less than the shards of one large corpus."""

import contextlib
import resource

_ENOUGH = 1 << 16


def raise_limit() -> None:
    """Raises the soft limit as far as a process may, which is the hard one. To be called once, first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # some systems have yet another limit; then it stays as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def share() -> int:
    """Files that each of the three splits of a data set may hold open: a quarter of the limit; a quarter is left for others."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, (_ENOUGH if soft == resource.RLIM_INFINITY else soft) // 4)
