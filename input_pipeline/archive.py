"""Image files out of a folder, a zip or tar archives, read in place.

Nothing is ever unpacked to disk, so a hostile path in an archive can do no harm; such entries are
skipped. Every file met is either yielded or reported to `on_skip`, so that counts always add up.
"""

import contextlib
import glob
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
    ".gif",
)
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# Why a file is none of the images.
NO_IMAGE, OF_A_MAC = "not an image file", "macOS metadata"
ARCHIVE_WITHIN = "archive beside or within the images: unpack it, or name it as the source"
MAX_FILE_BYTES = 256 << 20
# Pictures are packed already: what grows more than this in unpacking is no picture.
MAX_RATIO = 200
PART_FILES = 1000  # of a source that is read by many workers
_ZIP64_END = 76  # bytes of the two records that a zip64 has before the end record of every zip,
_ZIP_END = _ZIP64_END + 22 + (1 << 16)  # and of all three with the longest comment
_UTF8 = 1 << 11  # the flag of a zip's entry whose name is written so
_SMALL = 1 << 20  # bytes; below this a file may be packed as well as it likes
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
# zipfile takes a damaged directory at its word: names that are no UTF-8, versions, huge offsets.
_ZIP_DAMAGE = (*_DAMAGE, ValueError, RuntimeError, OverflowError, struct.error)


class _Bomb(Exception):
    """A file within an archive that would unpack to far more than it is."""


Source = str | os.PathLike | Sequence[str | os.PathLike]
OnSkip = Callable[[str, str], None]


def resolve_source(source: Source) -> list[Path]:
    """Returns the folders and archive files that `source` stands for, in order.

    `source` is a path, a glob (`utkface-0*.tar`), several of these with commas between, or a list.
    A folder without images stands for the archives in it. Raises FileNotFoundError or ValueError.
    """
    if isinstance(source, str | os.PathLike):
        names = [os.fspath(source)]
        if not os.path.exists(names[0]) and "," in names[0]:
            names = [part.strip() for part in names[0].split(",") if part.strip()]
    else:
        names = [os.fspath(part) for part in source]
    if not names or not all(names):
        raise ValueError("no data source was given: name a folder, a zip or tar archives")
    paths = [path for name in names for path in _expand(name)]
    return list(dict.fromkeys(paths))


def iter_images(source: Source, *, on_skip: OnSkip | None = None) -> Iterator[tuple[str, bytes]]:
    """Yields (relative path, bytes) of every image file in `source` (see `resolve_source`).

    With several archives the relative path begins with the archive's name, and where two are called
    alike with the folders that tell them apart. Files that are no
    images, unsafe, empty, larger than 256 MiB, or packed too tightly go to
    `on_skip(relative_path, reason)`. Raises ValueError on an archive that is damaged, cut short,
    encrypted, or unpacks to hundreds of times its size.
    """
    for path, prefix in _prefixed(source):
        yield from _read_images(_entries(path, prefix), on_skip or (lambda path, why: None))


class Part(NamedTuple):
    """A stretch of the files of one archive or folder: those from `start` up to `stop`."""

    path: Path
    prefix: str  # what the relative paths begin with
    start: int
    stop: int | None


def split_source(source: Source) -> list[Part]:
    """Returns parts of at most PART_FILES files which make up `source`, to be read apart.

    A tar has no table of contents, so it is one part.
    """
    parts = []
    for path, prefix in _prefixed(source):
        count = count_files(path)
        if count is None:
            parts.append(Part(path, prefix, 0, None))
        else:
            starts = range(0, count, PART_FILES)
            parts += [Part(path, prefix, start, start + PART_FILES) for start in starts]
    return parts


def iter_part(part: Part, *, on_skip: OnSkip) -> Iterator[tuple[str, bytes]]:
    """Yields (relative path, bytes) as `iter_images` does, of one part of a source."""
    entries = islice(_entries(part.path, part.prefix), part.start, part.stop)
    return _read_images(entries, on_skip)


def list_files(source: Source, *, limit: float = 2000) -> tuple[list[str], Counter[str]]:
    """Returns (relative paths of the images, why how many others are none) without reading them.

    Stops at `limit` images, for a packed tar has to be unpacked to be listed.
    """
    names, others = [], Counter()
    for path, prefix in _prefixed(source):
        for relative, name, size, _ in _entries(path, prefix):
            if reason := _why_not(name, size):
                others[reason] += 1
            elif len(names) < limit:
                names.append(relative)
            else:
                return names, others
    return names, others


def read_tables(source: Source) -> dict[str, bytes]:
    """Returns {relative path: content} of the CSV files in `source`, of those up to 256 MiB that
    are not packed too tightly."""
    tables = {}
    for path, prefix in _prefixed(source):
        for relative, name, size, read in _entries(path, prefix):
            if name.lower().endswith(".csv") and not _is_mac(name) and size:
                if size <= MAX_FILE_BYTES:
                    with contextlib.suppress(_Bomb):
                        tables[relative] = read()
    return tables


def _prefixed(source: Source) -> list[tuple[Path, str]]:
    """The folders and archives of a source, each with what the relative paths of its files begin
    with: nothing for a single one, or names that no two share."""
    paths = resolve_source(source)
    if len(paths) == 1:
        return [(paths[0], "")]
    if len({path.name for path in paths}) == len(paths):
        return [(path, f"{path.name}/") for path in paths]
    whole = [path.absolute() for path in paths]
    above = os.path.commonpath(path.parent for path in whole)
    return [(path, f"{path.relative_to(above).as_posix()}/") for path in whole]


def _entries(path: Path, prefix: str):
    """Yields (relative path, name, size, function to read it) of the files of one source."""
    for name, size, read in (_iter_folder if path.is_dir() else _reader(path))(path):
        yield _clean(prefix + name), name, size, read


def _read_images(entries, on_skip: OnSkip) -> Iterator[tuple[str, bytes]]:
    for relative, name, size, read in entries:
        if reason := _why_not(name, size):
            on_skip(relative, reason)
            continue
        try:
            data = read()
        except PermissionError as error:
            on_skip(relative, f"cannot be read ({error.strerror})")
            continue
        except _Bomb as error:
            on_skip(relative, str(error))
            continue
        if len(data) > MAX_FILE_BYTES:
            on_skip(relative, "file larger than 256 MiB")
            continue
        yield relative, data


def count_files(source: Source) -> int | None:
    """Returns the number of files in `source`, or None for a tar, which only reading would tell."""
    total = 0
    for path in resolve_source(source):
        if path.is_dir():
            total += sum(1 for _ in walk_files(path))
        elif _is_zip(path):
            with _open_zip(path) as archive:
                total += len(_zip_files(archive))
        else:
            return None
    return total


def describe(source: Source) -> list[tuple[str, int, int]]:
    """Returns (name, bytes, mtime in ns) of the archives, or of each file of a folder, sorted."""
    rows = []
    for path in resolve_source(source):
        files = [path / name for name in walk_files(path)] if path.is_dir() else [path]
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            if file.exists():
                stat = file.stat()
                rows.append((name, stat.st_size, stat.st_mtime_ns))
            else:  # a link to nothing or to itself, which reading will list as such
                rows.append((name, 0, 0))
    return sorted(rows)


def _expand(name: str) -> list[Path]:
    path = Path(os.path.expanduser(name))
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{name} is a link to nothing or to itself: name the folder, zip or tars it stood for"
        )
    if not path.exists():
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise FileNotFoundError(f"{name} does not exist (looked from {Path.cwd()})")
        return [part for name in found for part in _expand(name)]
    if not path.is_dir():
        return [path]
    files = list(walk_files(path))
    if not files:
        raise ValueError(f"{name} is an empty folder: give the folder, zip or tars with the images")
    if any(file.lower().endswith(IMAGE_SUFFIXES) and not _is_mac(file) for file in files):
        return [path]
    archives = [path / file for file in sorted(files) if _is_archive_name(file)]
    return archives or [path]


def walk_files(folder: Path) -> Iterator[str]:
    """Yields the files under `folder` in sorted order; a linked folder is entered once. Raises
    OSError where a folder cannot be read: its files would be missing from every count."""

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for file in sorted(files):
            yield Path(parent, file).relative_to(folder).as_posix()


def _why_not(name: str, size: int | None) -> str | None:
    """Says why an entry is not read, or None. A size of None marks a link or a device."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or name.startswith(("/", "\\")) or (name[1:2] == ":" and name[0].isalpha()):
        return "unsafe path in the archive"
    if _is_mac(name):
        return OF_A_MAC
    if _is_archive_name(name):
        return ARCHIVE_WITHIN
    if not name.lower().endswith(IMAGE_SUFFIXES):
        return NO_IMAGE
    if size is None:
        return "a link or device, not a file"
    if size == 0:
        return "empty file"
    if size > MAX_FILE_BYTES:
        return "file larger than 256 MiB"
    return None


def _clean(name: str) -> str:
    """Forward slashes, and characters that can be written as UTF-8, into a row of a table too."""
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return name.replace("\\", "/").replace("\r", "\ufffd")


def _is_mac(name: str) -> bool:
    path = PurePosixPath(name)
    return "__MACOSX" in path.parts or path.name.startswith("._") or path.name == ".DS_Store"


def _is_archive_name(name: str) -> bool:
    return name.lower().endswith(ARCHIVE_SUFFIXES) and not _is_mac(name)


def _iter_folder(folder: Path):
    for name in walk_files(folder):
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        yield name, size, file.read_bytes


def _reader(path: Path):
    """Returns the function which reads this archive; raises ValueError where there is none."""
    if _is_zip(path):
        return _iter_zip
    try:
        with tarfile.open(path):
            return _iter_tar
    except _DAMAGE as error:
        raise ValueError(_not_an_archive(path, error)) from error


def _not_an_archive(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(512)
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return f"{path} is one image: give the folder, zip or tars that hold the images"
    if start.lstrip()[:1] == b"<":
        return f"{path} is a web page, not an archive: the download did not fetch the file"
    if start[:2] == b"PK":
        return f"{path} is a damaged or cut off zip: download it again"
    if start[:4] in (b"Rar!", b"7z\xbc\xaf"):
        return f"{path} is a rar or 7z archive: unpack it and give the folder"
    if path.name.lower().endswith(ARCHIVE_SUFFIXES):
        return f"{path} cannot be read as an archive ({_short(error)}): download it again"
    return f"{path} is not a folder, a zip or a tar archive"


def _short(error: Exception) -> str:
    """tarfile lists every format it tried on lines of its own; the first line says enough."""
    return str(error).partition("\n")[0].rstrip(":")


def _is_zip(path: Path) -> bool:
    # is_zipfile alone looks only at the end, where a tar may hold a zip as its last member.
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return False
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except _ZIP_DAMAGE as error:
        raise ValueError(f"{path} is a damaged zip ({error}): download it again") from error
    # A damaged length in the directory hides the entries after it, and zipfile reads on.
    found, told = len(archive.infolist()), _told_entries(path)
    if told is not None and (found - told) % (1 << 16):
        archive.close()
        raise ValueError(f"{path} is a damaged zip ({found} of {told} entries): download it again")
    # zipfile takes whatever lies before the last of several for no part of it. (A zip that could
    # have become several begins with a mark of four bytes.)
    if min((info.header_offset for info in archive.infolist()), default=0) > 4:
        archive.close()
        raise ValueError(f"{path} begins with another zip: name its parts apart")
    return archive


def _told_entries(path: Path) -> int | None:
    """How many entries the end of a zip says there are: their last 16 bits where no record of a
    zip64 has all, None where that is missing."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, _ZIP_END), os.SEEK_END)
        zip64, _, end = file.read().rpartition(b"PK\5\6")
    (told,) = struct.unpack_from("<H", end, 6)
    if told < (1 << 16) - 1:
        return told
    record = zip64[-_ZIP64_END:]
    return struct.unpack_from("<Q", record, 32)[0] if record.startswith(b"PK\6\6") else None


def _zip_files(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    # Not by is_dir, which fails on the empty name that a damaged directory may hold.
    return [i for i in archive.infolist() if i.file_size or not i.filename.endswith("/")]


def _iter_zip(path: Path):
    with _open_zip(path) as archive:
        infos = _zip_files(archive)
        unpacked = sum(info.file_size for info in infos if not _why_not(info.filename, 1))
        _check_ratio(path, unpacked, path.stat().st_size)
        for info in infos:
            if info.flag_bits & 1:
                raise ValueError(
                    f"{path} is encrypted: unpack it with its password (7z x '{path.name}') and "
                    "give the folder"
                )
            yield _zip_name(info), info.file_size, lambda info=info: _read_zip(path, archive, info)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The name of an entry; zip on Linux and a Mac's archiver write UTF-8 without saying so."""
    if not info.flag_bits & _UTF8:
        with contextlib.suppress(UnicodeError):
            return info.filename.encode("cp437").decode("utf-8")
    return info.filename


def _check_ratio(path: Path, unpacked: int, size: int) -> None:
    if unpacked > MAX_FILE_BYTES and unpacked > MAX_RATIO * size:
        raise ValueError(
            f"{path} ({size:,} bytes) would unpack to {unpacked:,} bytes or more, as no pictures "
            "do: refused as a decompression bomb"
        )


def _read_zip(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    # The size in the directory is what Python unpacks at most, then it compares the checksum.
    if info.file_size > max(_SMALL, MAX_RATIO * info.compress_size):
        times = info.file_size // max(1, info.compress_size)
        raise _Bomb(f"packed more tightly than a picture can be ({times:,}-fold)")
    try:
        with archive.open(info) as file:
            return file.read(MAX_FILE_BYTES + 1)
    except NotImplementedError as error:
        raise ValueError(
            f"{path} uses a compression that Python cannot read: unpack it and give the folder"
        ) from error
    except _ZIP_DAMAGE as error:
        raise ValueError(f"{path} is damaged ({error}): download it again") from error


def _iter_tar(path: Path):
    packed = path.stat().st_size
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                _check_ratio(path, member.offset_data + member.size, packed)
                if not member.isdir():
                    size = member.size if member.isfile() else None
                    yield member.name, size, lambda m=member: _read_tar(path, archive, m)
            _check_end(archive)
    except _DAMAGE as error:
        raise _damaged_tar(path, error) from error


def _check_end(archive: tarfile.TarFile) -> None:
    """Raises ReadError unless a tar ends with zeros and nothing else: Python takes a bare end of
    file and a damaged header for the end as well. All is read, for gzip's checksum comes last."""
    archive.fileobj.seek(archive.offset)
    rest = archive.fileobj.read(tarfile.BLOCKSIZE)
    if len(rest) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end of data")
    while rest:
        if rest.strip(b"\0"):
            raise tarfile.ReadError("a header is damaged, or another archive follows")
        rest = archive.fileobj.read(1 << 20)


def _read_tar(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        return archive.extractfile(member).read()
    except _DAMAGE as error:
        raise _damaged_tar(path, error) from error


def _damaged_tar(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or cut short ({_short(error)}): download it again")
