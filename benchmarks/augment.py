r"""Views a second of our augmentation against dm-pix, augmax and torchvision v2, and their pixels.

    pip install torch && pip install --no-deps torchvision && pip install dm-pix augmax
    python benchmarks/augment.py

Every contender makes the same SimCLR view: random-resized crop, flip, colour jitter, grey, blur,
normalise, with draws of its own for each image. The JAX libraries are vmapped and jitted on the
default device (dm-pix has no random-resized crop: it gets jax.image.scale_and_translate);
torchvision runs on the CPU, an image at a time, as its draws are per call. The second table
compares single operations at equal parameters with torchvision's, in grey levels of 255.
"""

import argparse
import importlib.util
import statistics
import time
from functools import partial

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from coatnet_jax import augment
from coatnet_jax.runtime import set_up

CROP, RATIO, JITTER, SIGMA = (0.3, 1.0), (0.85, 1.18), 0.5, (0.1, 1.0)


def pictures(count: int, side: int) -> np.ndarray:
    """Smooth random images, uint8 [count, side, side, 3], of middling colours."""
    noise = np.random.default_rng(0).uniform(60, 190, (count, 12, 12, 3)).astype(np.float32)
    return np.stack([cv2.resize(n, (side, side), interpolation=cv2.INTER_CUBIC) for n in noise])


def ours(size: int):
    return jax.jit(partial(augment.simclr_view, size=size))


def dm_pix_view(size: int):
    import dm_pix

    def one(rng, image):
        keys = jax.random.split(rng, 9)
        x = _random_resized_crop(keys[0], image / 255.0, size)
        x = dm_pix.random_flip_left_right(keys[1], x)

        def jitter(x):
            x = dm_pix.random_brightness(keys[2], x, 0.8 * JITTER)
            x = dm_pix.random_contrast(keys[3], x, 1 - 0.8 * JITTER, 1 + 0.8 * JITTER)
            x = dm_pix.random_saturation(keys[4], x, 1 - 0.8 * JITTER, 1 + 0.8 * JITTER)
            return dm_pix.random_hue(keys[5], x, 0.2 * JITTER)

        choose = jax.random.uniform(keys[6], (3,))
        x = jnp.where(choose[0] < 0.8, jitter(x), x)
        x = jnp.where(choose[1] < 0.2, dm_pix.rgb_to_grayscale(x, keep_dims=True), x)
        sigma = jax.random.uniform(keys[7], (), minval=SIGMA[0], maxval=SIGMA[1])
        blurred = dm_pix.gaussian_blur(x, sigma, 2 * (size // 20) + 1)
        x = jnp.where(choose[2] < 0.2, blurred, x)
        return augment.normalize(255 * jnp.clip(x, 0, 1))

    return jax.jit(lambda rng, images: jax.vmap(one)(jax.random.split(rng, len(images)), images))


def _random_resized_crop(key, image, size):
    """jax.image's antialiased resize of a random box, with the box drawn as torchvision does."""
    area, log_ratio, top, left = jax.random.uniform(key, (4,))
    h, w, _ = image.shape
    area = h * w * (CROP[0] + area * (CROP[1] - CROP[0]))
    aspect = jnp.exp(np.log(RATIO[0]) + log_ratio * (np.log(RATIO[1]) - np.log(RATIO[0])))
    height = jnp.minimum(jnp.sqrt(area / aspect), h)
    width = jnp.minimum(jnp.sqrt(area * aspect), w)
    scale = jnp.array([size / height, size / width])
    shift = -jnp.array([top * (h - height), left * (w - width)]) * scale
    return jax.image.scale_and_translate(image, (size, size, 3), (0, 1), scale, shift, "linear")


def augmax_view(size: int):
    import augmax

    chain = augmax.Chain(
        augmax.ByteToFloat(),
        augmax.RandomSizedCrop(size, size, zoom_range=(1.0, CROP[0] ** -0.5)),
        augmax.HorizontalFlip(),
        augmax.ColorJitter(
            brightness=0.8 * JITTER, contrast=0.8 * JITTER, saturation=0.8 * JITTER, p=0.8
        ),
        augmax.RandomGrayscale(p=0.2),
        augmax.GaussianBlur(sigma=SIGMA[1], p=0.2),
        augmax.Normalize(),
    )
    return jax.jit(lambda rng, images: jax.vmap(chain)(jax.random.split(rng, len(images)), images))


def torchvision_view(size: int):
    import torch
    from torchvision_stub import make_importable

    make_importable()
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(0.8 * JITTER, 0.8 * JITTER, 0.8 * JITTER, 0.2 * JITTER)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=CROP, ratio=RATIO, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([jitter], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(2 * (size // 20) + 1, sigma=SIGMA)], p=0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )

    def view(_, images):
        tensors = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
        return torch.stack([transform(image) for image in tensors])

    return view


MAKERS = {
    "ours": (ours, "jax"),
    "dm-pix": (dm_pix_view, "dm_pix"),
    "augmax": (augmax_view, "augmax"),
    "torchvision v2": (torchvision_view, "torchvision"),
}


def speed(*, size: int, source: int, batch: int, rounds: int) -> None:
    """Prints views/s of each contender."""
    images = pictures(batch, source).astype(np.uint8)
    views = {
        label: make(size)
        for label, (make, package) in MAKERS.items()
        if importlib.util.find_spec(package)
    }
    on_device = jnp.asarray(images)
    rates = {label: [] for label in views}
    for n in range(rounds + 1):
        for label, view in views.items():
            started = time.perf_counter()
            out = view(jax.random.key(n), on_device)
            getattr(out, "block_until_ready", lambda: None)()
            if n > 0:  # the first round compiles
                rates[label].append(batch / (time.perf_counter() - started))
    medians = {label: statistics.median(values) for label, values in rates.items()}
    device = jax.local_devices()[0].device_kind
    print(f"\n{source} -> {size} px, batch {batch}, {device}, medians of {rounds} rounds\n")
    print("| | views/s | ours is |\n|---|---:|---:|")
    for label, rate in medians.items():
        print(f"| {label} | {rate:,.0f} | {medians['ours'] / rate:.1f} x |")
    for label in MAKERS.keys() - medians.keys():
        print(f"{label} is not installed")


def agreement(size: int, source: int) -> None:
    """Prints how far single operations lie from torchvision's, on floats of 0-255."""
    import torch
    from torchvision_stub import make_importable

    make_importable()
    from torchvision.transforms.v2 import functional as f

    image = pictures(1, source)[0].clip(60, 190)
    tensor = torch.from_numpy(image / 255).permute(2, 0, 1)
    small = torch.from_numpy(cv2.resize(image, (size, size)) / 255).permute(2, 0, 1)
    plain = small.permute(1, 2, 0).numpy() * 255
    top, left, height, width = 12, 7, source - 40, source - 31
    rows = augment._resize_matrix(float(top), float(height), source, size)
    columns = augment._resize_matrix(float(left), float(width), source, size)
    blur = augment._blur_matrix(jax.random.key(0), size, prob=1.1, sigma=(1.0, 1.0))
    eye = jnp.eye(size)

    def coloured(matrix, contrast=1.0):
        return _rendered(plain, eye, eye, matrix, contrast)

    same = jnp.eye(3)
    grey = jnp.ones((3, 1)) * augment._LUMA[None]
    pairs = {
        "crop and antialiased resize": (
            _rendered(image, rows, columns, same),
            f.resized_crop(tensor, top, left, height, width, [size, size], antialias=True),
        ),
        "brightness 1.2": (
            coloured(augment._colour_matrix(1.2, 1.0, 0.0)),
            f.adjust_brightness(small, 1.2),
        ),
        "contrast 1.3": (coloured(same, 1.3), f.adjust_contrast(small, 1.3)),
        "saturation 0.6": (
            coloured(augment._colour_matrix(1.0, 0.6, 0.0)),
            f.adjust_saturation(small, 0.6),
        ),
        "grey": (coloured(grey), f.rgb_to_grayscale(small, 3)),
        "blur, sigma 1": (
            _rendered(plain, blur, blur, same),
            f.gaussian_blur(small, [11, 11], [1.0, 1.0]),
        ),
        "hue 0.05 (ours turns YIQ, torchvision HSV)": (
            coloured(augment._colour_matrix(1.0, 1.0, 0.05)),
            f.adjust_hue(small, 0.05),
        ),
    }
    print(f"\nSingle operations against torchvision {source} -> {size} px, in levels of 255\n")
    print("| | mean difference | greatest |\n|---|---:|---:|")
    for label, (mine, theirs) in pairs.items():
        off = np.abs(np.asarray(mine) - 255 * theirs.permute(1, 2, 0).numpy())
        print(f"| {label} | {off.mean():.4f} | {off.max():.4f} |")


def _rendered(image, rows, columns, matrix, contrast=1.0) -> np.ndarray:
    out = augment._render(
        jnp.asarray(image, jnp.float32)[None],
        rows[None],
        columns[None],
        jnp.asarray(matrix)[None],
        jnp.array([contrast], jnp.float32),
    )
    return 255 * (np.asarray(out[0]) * augment.IMAGE_STD + augment.IMAGE_MEAN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--source", type=int, default=128)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    set_up()
    speed(
        size=arguments.size,
        source=arguments.source,
        batch=arguments.batch,
        rounds=arguments.rounds,
    )
    if importlib.util.find_spec("torchvision"):
        agreement(arguments.size, arguments.source)
    else:
        print("torchvision is not installed: no pixels to compare with")


if __name__ == "__main__":
    main()
