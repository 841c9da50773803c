"""Arrays of JAX between the calls of components."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import to_numpy

if TYPE_CHECKING:
    import jax


class JaxArrays:
    """Arrays that stay where JAX computes; whoever calls a component spreads them over its devices."""

    key = "jax"
    asynchronous = False

    def put(self, value: NDArray[Any]) -> "jax.Array":
        import jax.numpy as jnp

        return jnp.array(value)  # a copy: JAX would share the memory, which the caller may change

    def accept(self, value: Any) -> "jax.Array":
        import jax

        return value if isinstance(value, jax.Array) else self.put(to_numpy(value).astype(np.float32))

    def get(self, value: "jax.Array") -> NDArray[Any]:
        return np.asarray(value)

    def concat(self, values: Sequence["jax.Array"], axis: int = 0) -> "jax.Array":
        import jax.numpy as jnp

        return jnp.concatenate(list(values), axis)

    def finite(self, value: "jax.Array") -> Any:
        import jax.numpy as jnp

        return bool(jnp.isfinite(value).all())
