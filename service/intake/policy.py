"""The operator's placement policy: a file that is read once, at the start."""

from pathlib import Path

from pydantic import ValidationError

from service.core.errors import BlastdoorError
from service.core.placement import Policy
from service.intake.notation import NotationError, read_yaml

_MAX_BYTES = 256 * 1024


def read_policy(path: Path | None) -> Policy:
    """None: the rules as they are. A file that cannot be understood stops the start (BlastdoorError): guessing would
    weaken what the operator asked for."""
    if path is None:
        return Policy()
    try:
        return Policy.model_validate(read_yaml(path.read_bytes(), max_bytes=_MAX_BYTES) or {})
    except (NotationError, ValidationError) as error:
        raise BlastdoorError(f"the policy file cannot be used: {error}") from error
