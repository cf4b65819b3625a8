"""The codecs a `.lota` file may name."""

from .contract import PositionCodec, ValueCodec
from .gaps import Gaps
from .planes import Planes

POSITION_CODECS: dict[str, PositionCodec] = {codec.name: codec for codec in (Gaps(),)}
VALUE_CODECS: dict[str, ValueCodec] = {codec.name: codec for codec in (Planes(),)}

__all__ = ["POSITION_CODECS", "VALUE_CODECS", "PositionCodec", "ValueCodec"]
