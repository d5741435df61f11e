"""What nobody may read, such as the keys of W&B and of the Hub: no flag takes it, because flags are shown, sent and kept."""

import re
from collections.abc import Mapping

# Variables of such names hold it.
SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY|PRIVATE_KEY)$", re.IGNORECASE)


def refuse_secrets(environment: Mapping[str, str], instead: str) -> None:
    """Raises ValueError, without the value, for a variable whose name says that it is a secret.

    Args:
      instead: how the backend takes one.
    """
    if secret := [name for name in environment if SECRET.search(name)]:
        raise ValueError(f"--environment={secret[0]} would be shown to all who see the job: {instead}")


def names(flag: str) -> list[str]:
    """What is between the commas of a flag."""
    return [name.strip() for name in flag.split(",") if name.strip()]
