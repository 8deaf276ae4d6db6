"""Names for arrays with a type and a shape in annotations: `Float[Array, "t n"]`, as in jaxtyping.

Without jaxtyping loaded they stand for the array alone, which saves every command its import;
whoever wants shapes checked at run time imports it first.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import (
        Bool,
        Float,
        Float32,
        Float64,
        Int,
        Int16,
        Int64,
        Shaped,
        UInt8,
    )
else:

    class _Shaped:
        def __class_getitem__(cls, key: Any) -> Any:
            return key[0]

    Bool = Float = Float32 = Float64 = Int = Int16 = Int64 = Shaped = UInt8 = _Shaped

__all__ = ["Bool", "Float", "Float32", "Float64", "Int", "Int16", "Int64", "Shaped", "UInt8"]
