r"""Forward pass and training step of CoAtNet: ours against timm's, in interleaved rounds.

    pip install -e '.[parity]'
    python benchmarks/model_speed.py                             # coatnet_0, 224 px, batch 16
    python benchmarks/model_speed.py --models coatnet_0 --batch 256 --dtype bfloat16     # on a GPU
    python benchmarks/model_speed.py --image-size 256 --dtype bfloat16 --cudnn           # the same

Each contender is a process of its own that keeps its model, so that neither's allocator and threads
touch the other's; they take turns, and the table shows medians over the rounds that follow
WARM_UP others, in which the allocators find a place for the largest buffers. Both train with
AdamW on cross-entropy over 1,000 classes, and neither drops paths. timm runs channels_last: on the
CPU eager, as PyTorch comes and with the settings of the allocator that ours makes for itself and
that help it as much; on a GPU under autocast (with bfloat16), eager and through torch.compile,
which then makes attention's kernels too.
Memory is the peak of the process on the CPU, of the device's arrays on a GPU. TFLOP/s count two for
each multiply-add of the network, a training step as three forward passes; `peak` is what a large
matrix product of the same type reaches in the same run.
"""

import argparse
import contextlib
import gc
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator

from coatnet_jax.allocator import keep_freed_memory
from coatnet_jax.runtime import set_up

SIDE = 4096  # of the matrices whose product stands for the peak
WARM_UP = 6  # rounds; fresh pages can cost a step more than its arithmetic


class Ours:
    """coatnet_jax under jit; `options` are attributes of the backbone."""

    def __init__(self, name: str, size: int, batch: int, dtype: str, options: dict):
        from functools import partial

        # Before JAX is imported, as the command line does.
        set_up()
        # The contenders share one GPU, of which JAX would keep three quarters to itself.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax
        import jax.numpy as jnp
        import optax

        from coatnet_jax.heads import ClassifierModel
        from coatnet_jax.models import create_backbone

        self.name, self.size = name, size
        self.jax, self.jnp = jax, jnp
        model = ClassifierModel(create_backbone(name, dtype=dtype, **options), 1000)
        tx = optax.adamw(1e-4, weight_decay=0.05)
        images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
        labels = jnp.arange(batch) % 1000
        variables = jax.jit(partial(model.init, train=False))(jax.random.key(1), images[:1])

        @jax.jit
        def forward(variables, images):
            return model.apply(variables, images, train=False)["logits"]

        @partial(jax.jit, donate_argnums=0)
        def train(state, images, labels):
            params, batch_stats, opt_state = state

            def loss_fn(params):
                out, new = model.apply(
                    {"params": params, "batch_stats": batch_stats},
                    images,
                    train=True,
                    mutable=["batch_stats"],
                )
                losses = optax.softmax_cross_entropy_with_integer_labels(out["logits"], labels)
                return losses.mean(), new["batch_stats"]

            (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

        params = variables["params"]
        state = (params, variables["batch_stats"], tx.init(params))
        variables = jax.tree.map(jnp.copy, variables)  # the step is given its state's memory
        self.compile_seconds = {}
        for task, fn, args in (
            ("forward", forward, (variables, images)),
            ("train", train, (state, images, labels)),
        ):
            started = time.perf_counter()
            compiled = fn.lower(*args).compile()
            self.compile_seconds[task] = time.perf_counter() - started
            setattr(self, f"_{task}", compiled)
        self.variables, self.state, self.images, self.labels = variables, state, images, labels

    def forward(self) -> None:
        self._forward(self.variables, self.images).block_until_ready()

    def train(self) -> None:
        self.state, loss = self._train(self.state, self.images, self.labels)
        loss.block_until_ready()

    def memory(self) -> int:
        stats = self.jax.local_devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] if stats else _peak_resident()

    def peak_tflops(self, dtype: str) -> float:
        a = self.jnp.ones((SIDE, SIDE), dtype)
        product = self.jax.jit(lambda a: a @ a)
        product(a).block_until_ready()
        return 2 * SIDE**3 / _best(lambda: product(a).block_until_ready()) / 1e12

    def macs(self) -> float:
        from coatnet_jax.model_table import describe

        return describe(self.name, image_size=self.size)["multiply-adds, G"] * 1e9

    def device(self) -> str:
        return self.jax.local_devices()[0].device_kind


class Timm:
    """timm's model of the same name at 224 px; `compiled` puts it through torch.compile, with
    `allocator` it keeps freed memory as ours does."""

    def __init__(self, name: str, size: int, batch: int, dtype: str, options: dict):
        if options.get("allocator"):
            keep_freed_memory()
        import torch
        from torchvision_stub import make_importable

        make_importable()
        import timm

        self.torch = torch
        self.place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = self.place.type == "cuda"
        if dtype == "float32" and on_gpu:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        sized = {} if size == 224 else {"img_size": size}
        if options.get("compiled"):
            # Its kernel wants a bias of another layout than torch.compile gives, and is refused.
            timm.layers.set_fused_attn(False)
        model = timm.create_model(f"{name}_224", drop_path_rate=0.0, **sized)
        model = model.to(self.place, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05)
        self.model = torch.compile(model) if options.get("compiled") else model
        self.images = torch.randn(batch, 3, size, size, device=self.place)
        self.images = self.images.to(memory_format=torch.channels_last)
        self.labels = torch.arange(batch, device=self.place) % 1000
        self.autocast = lambda: torch.autocast(
            self.place.type, torch.bfloat16, enabled=dtype == "bfloat16"
        )
        self.compile_seconds = {}
        for task in ("forward", "train") if options.get("compiled") else ():
            started = time.perf_counter()
            getattr(self, task)()
            self.compile_seconds[task] = time.perf_counter() - started

    def forward(self) -> None:
        self.model.eval()
        with self.torch.no_grad(), self.autocast():
            self.model(self.images)
        self._wait()

    def train(self) -> None:
        self.model.train()
        with self.autocast():
            loss = self.torch.nn.functional.cross_entropy(self.model(self.images), self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._wait()

    def _wait(self) -> None:
        if self.place.type == "cuda":
            self.torch.cuda.synchronize()

    def memory(self) -> int:
        on_gpu = self.place.type == "cuda"
        return self.torch.cuda.max_memory_allocated() if on_gpu else _peak_resident()


def _peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _best(fn, rounds: int = 5) -> float:
    return min(_seconds(fn) for _ in range(rounds))


def _seconds(fn) -> float:
    started = time.perf_counter()
    fn()
    return time.perf_counter() - started


def _serve(pipe, make, arguments: tuple) -> None:
    """A contender's process: builds it, then times what it is asked for."""
    try:
        contender = make(*arguments)
        gc.freeze()  # what a model is made of: else each collection below goes through it again
        pipe.send(contender.compile_seconds)
        while request := pipe.recv():
            method, *args = request
            gc.collect()
            if method in ("forward", "train"):
                pipe.send(_seconds(getattr(contender, method)))
            else:
                pipe.send(getattr(contender, method)(*args))
    except Exception as error:  # the parent says it, and goes on with the others
        pipe.send(error)


class Process:
    """A contender that lives in a process of its own."""

    def __init__(self, make, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()

    def wait(self) -> None:
        """Until the contender is built."""
        self.compile_seconds = self._answer()

    def ask(self, *request):
        self.pipe.send(request)
        return self._answer()

    def _answer(self):
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise RuntimeError(f"{type(answer).__name__}: {answer}")
        return answer

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def compare(
    name: str,
    *,
    size: int,
    batch: int,
    dtype: str,
    rounds: int,
    scan: bool,
    cudnn: bool,
    at_once: bool,
) -> None:
    """Prints the table of one model."""
    import importlib.util

    contenders = {"ours": (Ours, {})}
    if scan:
        contenders["ours, scan"] = (Ours, {"scan": True})
    if cudnn:
        contenders["ours, cuDNN attention"] = (Ours, {"attention": "cudnn"})
    if importlib.util.find_spec("timm") and importlib.util.find_spec("torch"):
        contenders["timm"] = (Timm, {})
        if _has_cuda():
            contenders["timm, compiled"] = (Timm, {"compiled": True})
        else:
            contenders["timm, our allocator"] = (Timm, {"allocator": True})
    else:
        print(
            "timm or torch is not installed (pip install -e '.[parity]'): no peer to compare with"
        )
    running, times = {}, {label: {"forward": [], "train": []} for label in contenders}
    # One after the other unless asked otherwise, so that compile times do not share the cores.
    for group in [list(contenders)] if at_once else [[label] for label in contenders]:
        for label in group:
            make, options = contenders[label]
            running[label] = Process(make, name, size, batch, dtype, options)
        for label in group:
            with _left_out_if_it_fails(label, running):
                running[label].wait()
    print(f"{name}: {', '.join(running)} built; {rounds} rounds follow", flush=True)
    for task in ("forward", "train"):
        for n in range(WARM_UP + rounds):
            for label, process in list(running.items()):
                with _left_out_if_it_fails(label, running):
                    seconds = process.ask(task)
                    if n >= WARM_UP:
                        times[label][task].append(seconds)
    if "ours" not in running:
        sys.exit(f"{name}: ours did not run, so there is no table")
    peak, macs = running["ours"].ask("peak_tflops", dtype), running["ours"].ask("macs")
    print(
        f"\n{name}, {size} px, batch {batch}, {dtype}, {running['ours'].ask('device')}: medians of "
        f"{rounds} rounds, peak {peak:.2f} TFLOP/s\n"
    )
    print("| | task | ms an image | images/s | x timm | TFLOP/s | of peak | memory | compile |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for label, process in running.items():
        memory = process.ask("memory") / 2**30
        for task, factor in (("forward", 1), ("train", 3)):
            median = statistics.median(times[label][task])
            rate = 2 * macs * factor * batch / median / 1e12
            peer = times["timm"][task] if "timm" in running else None
            ratio = f"{statistics.median(peer) / median:.2f}" if peer else "-"
            compiled = process.compile_seconds.get(task)
            row = [label, task, f"{1000 * median / batch:.2f}", f"{batch / median:.1f}", ratio]
            row += [f"{rate:.3f}", f"{rate / peak:.0%}", f"{memory:.1f} GiB"]
            row += [f"{compiled:.1f} s" if compiled else "-"]
            print(f"| {' | '.join(row)} |")
    for process in running.values():
        process.close()


@contextlib.contextmanager
def _left_out_if_it_fails(label: str, running: dict) -> Iterator[None]:
    """One contender without memory should not cost the table of the others."""
    try:
        yield
    except (RuntimeError, EOFError, BrokenPipeError) as error:
        print(f"{label} is left out: {str(error) or 'its process was ended'}", flush=True)
        running.pop(label, None)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["coatnet_0"])
    parser.add_argument("--image-size", dest="size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scan", action="store_true", help="ours with scanned blocks as well")
    parser.add_argument("--cudnn", action="store_true", help="ours with cuDNN attention as well")
    parser.add_argument("--at-once", action="store_true", help="compile all at the same time")
    options = vars(parser.parse_args())
    for name in options.pop("models"):
        compare(name, **options)


if __name__ == "__main__":
    main()
