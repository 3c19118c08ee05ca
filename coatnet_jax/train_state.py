"""What a training step carries: arrays only. The model and the optimizer are static arguments."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Arrays of a run: everything that is needed to go on with it exactly.

    `rng` is a typed key that never changes; a step draws from `fold_in(rng, step)`. `ema_params` is
    None where no moving average is kept, and `extra` where a step needs nothing else (BYOL's target
    network, DINO's centre).
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    rng: jax.Array
    ema_params: Any = None
    extra: Any = None

    @property
    def eval_variables(self) -> dict[str, Any]:
        """Variables for evaluation: the moving average where there is one."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}


def _run_once(function: Callable, argument: Any) -> Any:
    """`function(argument)`, compiled to run once: by the CPU's compiler, for that of a GPU takes a
    minute for coatnet_0's initial values, and without optimisation, which would cost seconds to
    save milliseconds. NumPy arrays where JAX's default is another device."""
    if isinstance(jnp.zeros(()), jax.core.Tracer):  # options of a compiler have no place in a trace
        return jax.jit(function)(argument)
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others only
        return jax.jit(function)(argument)
    run = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
    if jax.default_backend() == "cpu":
        return run(argument)
    return jax.device_get(run(jax.device_put(argument, cpu)))


def init_variables(rng: jax.Array, model: nn.Module, *, image_size: int) -> dict[str, Any]:
    """{'params', 'batch_stats'} of an untrained model for square images."""
    return _run_once(_initializer(model, image_size), rng)


@lru_cache(maxsize=16)
def _initializer(model: nn.Module, image_size: int) -> Callable:
    """The same function for the same model, for which it is then compiled once in a process."""

    # Without the forward pass, whose kernels can be of another device than the one that compiles.
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)

    def init(rng: jax.Array) -> dict[str, Any]:
        variables = model.lazy_init(rng, images, train=False)
        return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

    return init


def create_train_state(
    rng: jax.Array,
    variables: dict[str, Any],
    tx: optax.GradientTransformation,
    *,
    ema: bool = False,
    extra: Any = None,
) -> TrainState:
    """A state at step 0 from initial (or loaded) variables."""
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=_run_once(tx.init, params),
        rng=rng,
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
        extra=extra,
    )


def apply_gradients(
    state: TrainState,
    grads: Any,
    batch_stats: Any,
    *,
    tx: optax.GradientTransformation,
    ema: float = 0.0,
) -> TrainState:
    """The state after one optimizer step; the moving average warms up as min(ema, (1+t)/(10+t))."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
        # In this form parameters that do not change are their own average, to the last bit.
        ema_params = jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), ema_params, params)
    return state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema_params=ema_params,
    )
