"""A job that is a few words of Python in place of flowlm, for tests of what starts, watches and stops jobs."""

from launch.job import Job


class Program(Job):
    """config: the words. flags: what they are given."""

    @property
    def command(self) -> tuple[str, ...]:
        return ("-c", self.config, *self.flags)
