"""Options of a destination as `destinations.yaml` gives them: their base, and secrets that no file may hold."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, SecretStr


class FromEnvironment(str):
    """A text that stood as ${NAME} in the file."""


def _referred(value: object) -> object:
    if isinstance(value, SecretStr):
        return value
    if not isinstance(value, FromEnvironment):
        raise ValueError("write ${NAME}, the name of an environment variable: a file is no place for a secret")
    if not value:
        raise ValueError("the environment variable is empty")
    return SecretStr(str(value))


Secret = Annotated[SecretStr, BeforeValidator(_referred)]
Kept = Literal["propensity", "percentile", "segment", "model"]  # what a destination may be given of a person


class Options(BaseModel):
    """The base of every destination's options: no unknown key, no change once read, no value of a secret in an error.

    A module of a kind of destination has a `class Options`, which extends this one, and
    `def build(name: str, options: Options) -> Destination`, the name being the destination's in the file.
    Tests give a `Secret` as `SecretStr("...")`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
