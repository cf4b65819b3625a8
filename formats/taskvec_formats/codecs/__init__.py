"""Codecs for the positions and values in `.lota` files (docs/format.md, section 5)."""

from .contract import Frame, PositionCodec, ValueCodec
from .exponents import Exponents
from .floats import Floats
from .gaps import Gaps
from .packed import Packed
from .paper64 import Paper64
from .plain import PlainPositions, PlainValues
from .steps import Steps

POSITION_CODECS: dict[str, PositionCodec] = {
    codec.name: codec for codec in (Gaps(), Exponents(), Paper64(), PlainPositions())
}
VALUE_CODECS: dict[str, ValueCodec] = {codec.name: codec for codec in (Floats(), Steps(), Packed(), PlainValues())}

__all__ = ["POSITION_CODECS", "VALUE_CODECS", "Frame", "Gaps", "PositionCodec", "ValueCodec"]
