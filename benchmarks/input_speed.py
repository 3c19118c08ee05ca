r"""Images a second into the step: our pipeline against torch's and TensorFlow's, same cores.

    pip install torch && pip install --no-deps torchvision       # the peer; tensorflow-cpu: another
    python benchmarks/input_speed.py --data ~/.cache/coatnet-jax/utkface

The task is two-view SimCLR input. torch's DataLoader (PIL, torchvision's transforms, a worker for
each core) and tf.data (its ops, parallel map; no blur, for it has none) make both views on the
host, as is usual there. Ours hands uint8 images of their own size to the device, which makes the
views within the jitted step: rows without views say what reaches the step, the last rows what
remains where that device is this CPU itself. `limit` is what libjpeg-turbo decodes to RGB on all
cores, the files in memory, nothing else done. All start from the same JPEG files. Ours, torch and
tf.data each have a process of their own, so that neither's threads and allocator touch the
others'; they take turns, and the table shows medians over the rounds.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import simplejpeg

from coatnet_jax.runtime import set_up
from input_pipeline.pipeline import decode_once, open_split, train_loader

CORES = len(os.sched_getaffinity(0))
BATCH = 128
TORCH = "torch DataLoader + torchvision"


def take(make_iterator, batches: int) -> float:
    """Images a second over `batches` batches after one to warm up."""
    iterator = make_iterator()
    next(iterator)
    started = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    rate = batches * BATCH / (time.perf_counter() - started)
    if hasattr(iterator, "close"):
        iterator.close()
    else:
        next(iterator, None)  # torch's workers end in order only with their epoch
    return rate


def decode_limit(files: list[bytes]) -> float:
    """Images a second that simplejpeg, our own decoder, decodes on all cores, each as it is."""
    with ThreadPoolExecutor(CORES) as pool:
        started = time.perf_counter()
        for _ in pool.map(_decode_chunk, [files[i::8] for i in range(8)]):
            pass
        return len(files) / (time.perf_counter() - started)


def _decode_chunk(files: list[bytes]) -> None:
    for data in files:
        simplejpeg.decode_jpeg(data, "RGB")


def decode_once_rate(faces, size: int) -> float:
    """Images a second of the one pass that fills the cache."""
    started = time.perf_counter()
    decode_once(faces, size, progress=None)
    return len(faces) / (time.perf_counter() - started)


def our_loader(faces, size: int, **options):
    return iter(train_loader(faces, batch_size=BATCH, image_size=size, seed=0, **options))


def our_views(faces, size: int, source: int):
    """Batches of two views, made by jax on its default device."""
    import jax

    from coatnet_jax.augment import simclr_view

    @jax.jit
    def views(rng, images):
        return tuple(simclr_view(key, images, size=size) for key in jax.random.split(rng))

    for n, batch in enumerate(our_loader(faces, source)):
        yield jax.block_until_ready(views(jax.random.key(n), batch["image"]))


class TwoViews:
    """torch's map-style data set: PIL and torchvision's transforms, two views an image."""

    def __init__(self, files: list[bytes], size: int):
        self.files, self.size, self.transform = files, size, None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int):
        from PIL import Image

        self.transform = self.transform or _torch_transform(self.size)
        image = Image.open(io.BytesIO(self.files[i])).convert("RGB")
        return self.transform(image), self.transform(image)


def _torch_transform(size: int):
    from torchvision_stub import make_importable

    make_importable()
    from torchvision import transforms as t

    jitter = t.ColorJitter(0.4, 0.4, 0.4, 0.1)
    return t.Compose(
        [
            t.RandomResizedCrop(size, scale=(0.3, 1.0), ratio=(0.85, 1.18)),
            t.RandomHorizontalFlip(),
            t.RandomApply([jitter], p=0.8),
            t.RandomGrayscale(0.2),
            t.RandomApply([t.GaussianBlur(2 * (size // 20) + 1, sigma=(0.1, 1.0))], p=0.2),
            t.ToTensor(),
            t.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )


def torch_loader(files: list[bytes], size: int, batches: int):
    """An epoch of that many batches."""
    import torch

    loader = torch.utils.data.DataLoader(
        TwoViews(files[: batches * BATCH], size),
        batch_size=BATCH,
        shuffle=True,
        num_workers=CORES,
        multiprocessing_context="spawn",
    )
    return iter(loader)


def tf_loader(files: list[bytes], size: int):
    import tensorflow as tf

    def view(data):
        image = tf.io.decode_jpeg(data, channels=3)
        box = tf.image.sample_distorted_bounding_box(
            tf.shape(image),
            tf.zeros([0, 0, 4]),
            area_range=(0.3, 1.0),
            aspect_ratio_range=(0.85, 1.18),
            use_image_if_no_bounding_boxes=True,
        )
        image = tf.slice(image, box[0], box[1])
        image = tf.image.resize(tf.cast(image, tf.float32) / 255, (size, size), antialias=True)
        image = tf.image.random_flip_left_right(image)
        image = tf.image.random_brightness(image, 0.4)
        image = tf.image.random_contrast(image, 0.6, 1.4)
        image = tf.image.random_saturation(image, 0.6, 1.4)
        return tf.image.random_hue(image, 0.1)

    data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    data = data.map(lambda x: (view(x), view(x)), num_parallel_calls=tf.data.AUTOTUNE)
    return iter(data.batch(BATCH).prefetch(tf.data.AUTOTUNE))


def our_measures(data: str, size: int, source: int, images: int) -> dict:
    """label -> function that measures images/s of our pipeline, or of the bare decoding, once."""
    set_up()  # as the command line does
    faces, files = open_split(data, "train"), read_files(data, images)
    held = decode_once(faces, source, progress=None)
    return {
        "limit: JPEG decode": partial(decode_limit, files),
        "ours, cache none": lambda: take(lambda: our_loader(faces, source), 30),
        "ours, filling the cache": partial(decode_once_rate, faces, source),
        "ours, cache host": lambda: take(lambda: our_loader(held, source), 60),
        "ours, cache device": lambda: take(
            lambda: our_loader(held, source, with_images=False), 200
        ),
        "ours, and two views made on this CPU": lambda: take(
            lambda: our_views(faces, size, source), 4
        ),
    }


def torch_measures(data: str, size: int, source: int, images: int) -> dict:
    """The same of torch."""
    files = read_files(data, images)
    return {TORCH: lambda: take(lambda: torch_loader(files, size, 5), 4)}


def tf_measures(data: str, size: int, source: int, images: int) -> dict:
    """The same of TensorFlow."""
    files = read_files(data, images)
    return {"tf.data": lambda: take(lambda: tf_loader(files, size), 4)}


def read_files(data: str, images: int) -> list[bytes]:
    """The first JPEG files of the training split."""
    faces = open_split(data, "train")
    n = min(images, len(faces))
    found = (faces.read_images(range(i, min(i + 500, n))) for i in range(0, n, 500))
    return list(itertools.chain(*found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a prepared data set")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 224])
    parser.add_argument("--source-size", type=int, default=200, help="px that the device is given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=4000)
    arguments = parser.parse_args()
    sides = [our_measures]
    sides += [torch_measures] if importlib.util.find_spec("torchvision") else []
    sides += [tf_measures] if importlib.util.find_spec("tensorflow") else []
    for size in arguments.sizes:
        settings = (arguments.data, size, arguments.source_size, arguments.images)
        rates = measure(sides, settings, rounds=arguments.rounds)
        report(rates, f"{size} px, medians of {arguments.rounds} rounds")


def measure(sides: list, settings: tuple, *, rounds: int) -> dict[str, list[float]]:
    """label -> images/s of each round; every side in a process of its own, one at a time."""
    context = multiprocessing.get_context("spawn")
    rates: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        pipes = []
        for side in sides:
            pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, side, settings))
            process.start()
            stack.callback(process.join)
            stack.callback(pipe.send, False)  # before the join: the last is called first
            pipes.append((pipe, pipe.recv()))
        for _ in range(rounds):
            for pipe, labels in pipes:
                for label in labels:
                    pipe.send(label)
                    rates.setdefault(label, []).append(pipe.recv())
    return rates


def serve(pipe, side, settings: tuple) -> None:
    """A side's process: says what it measures, then measures what it is asked for."""
    measures = side(*settings)
    pipe.send(list(measures))
    while label := pipe.recv():
        pipe.send(measures[label]())


def report(rates: dict[str, list[float]], title: str) -> None:
    """Print the table of one size."""
    medians = {label: statistics.median(values) for label, values in rates.items()}
    limit, peer = medians["limit: JPEG decode"], medians.get(TORCH)
    print(f"\n{title}, batch {BATCH}, {CORES} cores\n")
    print("| | images/s | of the decode limit | x torch |\n|---|---:|---:|---:|")
    for label, rate in medians.items():
        ratio = f"{rate / peer:.1f}" if peer else "-"
        print(f"| {label} | {rate:,.0f} | {rate / limit:.0%} | {ratio} |", flush=True)
    if not peer:
        print("no peer: torch or torchvision is not installed (see the head of this file)")


if __name__ == "__main__":
    main()
