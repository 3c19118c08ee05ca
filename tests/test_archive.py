"""Folders, zips and tars give the same files; what cannot be read is counted, or refused."""

import gzip
import io
import os
import tarfile
import zipfile
from functools import partial

import pytest

from input_pipeline.archive import (
    count_files,
    describe,
    iter_images,
    iter_part,
    list_files,
    read_tables,
    resolve_source,
    split_source,
)

FILES = {
    "UTKFace/a.jpg": b"A" * 900,
    "UTKFace/b.JPEG": b"B" * 512,
    "UTKFace/notes.txt": b"text",
    "UTKFace/empty.jpg": b"",
    "__MACOSX/UTKFace/._a.jpg": b"mac",
    "UTKFace/.DS_Store": b"mac",
    "c.png": b"C" * 1025,
}
SKIPPED = {
    "UTKFace/notes.txt": "not an image file",
    "UTKFace/empty.jpg": "empty file",
    "__MACOSX/UTKFace/._a.jpg": "macOS metadata",
    "UTKFace/.DS_Store": "macOS metadata",
}


def write_folder(path, files=FILES):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path, files=FILES, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("UTKFace/", b"")
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path, files=FILES, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def read(source):
    skipped = {}
    return dict(iter_images(source, on_skip=skipped.__setitem__)), skipped


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "tar.xz"])
def test_every_kind_of_source_gives_the_same_files(tmp_path, kind):
    path = tmp_path / f"faces.{kind}"
    if kind == "folder":
        write_folder(path)
    elif kind == "zip":
        write_zip(path, compression=zipfile.ZIP_DEFLATED)
    else:
        write_tar(path, mode="w:" + kind.partition(".")[2])
    images, skipped = read(path)
    assert images == {name: FILES[name] for name in ("UTKFace/a.jpg", "UTKFace/b.JPEG", "c.png")}
    assert skipped == SKIPPED
    assert count_files(path) == (None if kind.startswith("tar") else len(FILES))


def test_several_archives_as_list_glob_commas_and_folder(tmp_path):
    one = write_tar(tmp_path / "faces-0.tar", {"UTKFace/a.jpg": b"A"})
    two = write_zip(tmp_path / "faces-1.zip", {"UTKFace/a.jpg": b"B"})
    (tmp_path / "README.md").write_text("no image")
    expected = {"faces-0.tar/UTKFace/a.jpg": b"A", "faces-1.zip/UTKFace/a.jpg": b"B"}
    sources = [one, str(two)], f"{tmp_path}/faces-*", f"{one}, {two}", tmp_path, [tmp_path, one]
    for source in sources:
        assert read(source)[0] == expected
    assert [name for name, _, _ in describe([two, one])] == ["faces-0.tar", "faces-1.zip"]


def test_archive_beside_images_is_reported_not_read(tmp_path):
    write_folder(tmp_path, {"a.jpg": b"A"})
    write_tar(tmp_path / "more.tar", {"b.jpg": b"B"})
    images, skipped = read(tmp_path)
    assert list(images) == ["a.jpg"] and "name it as the source" in skipped["more.tar"]


def test_unsafe_paths_and_links_are_skipped(tmp_path):
    path = write_tar(tmp_path / "bad.tar", {"../up.jpg": b"x", "/root.jpg": b"x", "ok.jpg": b"x"})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    images, skipped = read(path)
    assert list(images) == ["ok.jpg"]
    assert skipped == {
        "../up.jpg": "unsafe path in the archive",
        "/root.jpg": "unsafe path in the archive",
        "link.jpg": "a link or device, not a file",
    }


def test_linked_folder_is_read_once_and_a_loop_ends(tmp_path):
    real = write_folder(tmp_path / "real", {"a.jpg": b"A"})
    source = tmp_path / "source"
    source.mkdir()
    (source / "faces").symlink_to(real)
    (real / "loop").symlink_to(source)
    assert read(source)[0] == {"faces/a.jpg": b"A"}


def test_link_to_nothing_or_to_itself_is_listed_and_the_rest_goes_on(tmp_path):
    source = write_folder(tmp_path / "source", {"a.jpg": b"A"})
    links = {"b.jpg": tmp_path / "nothing", "c.jpg": "c.jpg", "d.jpg": "e.jpg", "e.jpg": "d.jpg"}
    for link, target in links.items():
        (source / link).symlink_to(target)
    images, skipped = read(source)
    assert list(images) == ["a.jpg"]
    assert skipped == dict.fromkeys(links, "a link or device, not a file")
    assert [row[0] for row in describe(source)] == ["a.jpg", *links]
    for link in ("b.jpg", "c.jpg", "d.jpg", "?.jpg"):
        with pytest.raises(FileNotFoundError, match="is a link to nothing or to itself"):
            resolve_source(source / link)


def test_folder_that_cannot_be_read_is_no_empty_folder(tmp_path, monkeypatch):
    source, scandir = write_folder(tmp_path / "source"), os.scandir

    def refuse(path):
        if os.fspath(path).endswith("UTKFace"):  # chmod would not stop root
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="UTKFace"):
        read(source)


def test_archives_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
        files = {"0.jpg": folder.encode(), "labels.csv": folder.encode()}
        write_zip(tmp_path / folder / "faces.zip", files)
    by_folder = {"test/faces.zip/0.jpg": b"test", "train/faces.zip/0.jpg": b"train"}
    tables = {name.replace("0.jpg", "labels.csv"): data for name, data in by_folder.items()}
    both = [tmp_path / folder / "faces.zip" for folder in ("test", "train")]
    for source in (tmp_path, both):
        assert read(source)[0] == by_folder
        assert read_tables(source) == tables
        assert list_files(source)[0] == list(by_folder)
        parts = [dict(iter_part(p, on_skip=lambda *_: None)) for p in split_source(source)]
        assert {name: data for part in parts for name, data in part.items()} == by_folder


def test_names_of_a_zip_in_utf8_without_the_flag_are_read_as_such(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"jos\xe9_1.jpg": b"A", "plain.jpg": b"B"})
    data = bytearray(path.read_bytes())
    for start, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for place in (i for i in range(len(data)) if data.startswith(start, i)):
            data[place + flags + 1] &= ~8
    path.write_bytes(data)
    assert "jos\xe9_1.jpg" not in zipfile.ZipFile(path).namelist()
    assert read(path)[0] == {"jos\xe9_1.jpg": b"A", "plain.jpg": b"B"}
    path.write_bytes(data.replace(b"\xc3\xa9", b"\x82e"))  # an e with an acute accent in DOS
    assert list(read(path)[0]) == ["jos\xe9e_1.jpg", "plain.jpg"]


def test_carriage_return_of_a_name_is_replaced(tmp_path):
    assert list(read(write_zip(tmp_path / "a.zip", {"30\r.jpg": b"A"}))[0]) == ["30\ufffd.jpg"]


def test_name_that_is_no_utf8_can_be_written(tmp_path):
    path = tmp_path / "old.tar"
    with tarfile.open(path, "w", encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("caf\u00e9.txt"))
    _, skipped = read(path)
    assert [name.encode() for name in skipped]


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    return path


def encrypted_zip(path):
    write_zip(path, {"a.jpg": b"A" * 100})
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x03\x04") + 6] |= 1  # the flag, before the file and in the directory
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    return path


def damaged_zip(path):
    write_zip(path, {"a.jpg": b"A" * 100})
    path.write_bytes(path.read_bytes().replace(b"AAAA", b"BBBB", 1))
    return path


def damaged_header(path, mode="w"):
    write_tar(path, {f"{i}.jpg": b"A" * 100 for i in range(6)})
    data = bytearray(path.read_bytes())
    data[3 * 1024 + 10] ^= 1
    path.write_bytes(gzip.compress(data) if mode == "w:gz" else data)
    return path


def flipped(path):
    """A packed tar, one bit of whose pictures is another."""
    files = {"a.jpg": bytes(range(256)) * 64}
    path.write_bytes(gzip.compress(write_tar(path, files).read_bytes(), 0))  # which only stores
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    return path


def joined(path, write):
    """Two archives one after the other, as `cat` joins them."""
    path.write_bytes(write(path).read_bytes() * 2)
    return path


def text(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: encrypted_zip(p / "locked.zip"), "encrypted: unpack it with its password"),
        (lambda p: damaged_zip(p / "crc.zip"), "damaged .*: download it again"),
        (lambda p: cut(write_zip(p / "cut.zip"), 2000), "damaged or cut off zip"),
        (lambda p: cut(write_tar(p / "cut.tar"), 1024), "cut short"),
        (lambda p: cut(write_tar(p / "edge.tar"), 1536), "cut short"),  # after a whole member
        (lambda p: cut(write_tar(p / "cut.tgz", mode="w:gz"), 150), "cut short|cannot be read"),
        (lambda p: damaged_header(p / "bit.tar"), "a header is damaged"),
        (lambda p: damaged_header(p / "bit.tgz", "w:gz"), "a header is damaged"),
        (lambda p: cut(damaged_header(p / "in.tar"), 3 * 1024 + 200), "cut short"),
        (lambda p: flipped(p / "flip.tgz"), "CRC check failed"),
        (lambda p: joined(p / "two.tar", write_tar), "another archive follows"),
        (lambda p: joined(p / "two.tgz", partial(write_tar, mode="w:gz")), "another archive"),
        (lambda p: joined(p / "two.zip", write_zip), "begins with another zip: name its parts"),
        (lambda p: text(p / "faces.tar", b"\0\1\2 nonsense"), "cannot be read as an archive"),
        (lambda p: text(p / "faces.zip", b" <!DOCTYPE html>"), "is a web page"),
        (lambda p: text(p / "faces.7z", b"7z\xbc\xaf"), "rar or 7z"),
        (lambda p: text(p / "me.jpg", b"\xff\xd8\xff"), "is one image"),
        (lambda p: text(p / "labels.csv", b"file,age"), "is not a folder, a zip or a tar"),
        (lambda p: (p / "bare").mkdir() or p / "bare", "is an empty folder"),
        (lambda p: [], "no data source was given"),
    ],
)
def test_unreadable_source_raises_one_clear_line(tmp_path, make, reason):
    with pytest.raises(ValueError, match=reason) as error:
        list(iter_images(make(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("limit", [1, 65535])  # from so many files on it is a zip64
def test_no_damage_to_the_directory_of_a_zip_ends_in_a_traceback(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", limit)
    path, refused = write_zip(tmp_path / "a.zip", {"\xe9.jpg": b"A" * 50, "b.png": b"B"}), []
    whole = path.read_bytes()
    for place in range(whole.index(b"PK\x01\x02"), len(whole)):
        for byte in {0, 255, whole[place] ^ 1, whole[place] ^ 128} - {whole[place]}:
            path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            for use in (read, count_files, list_files, read_tables):
                try:
                    use(path)
                except ValueError as error:
                    refused.append(str(error))
    assert len(refused) > 500
    assert all(line.startswith(f"{path} ") and "\n" not in line for line in refused)


@pytest.mark.parametrize("limit", [1, 65535])
@pytest.mark.parametrize("comment", [b"", b"of a zip"])
def test_files_that_a_damaged_directory_hides_are_missed(tmp_path, monkeypatch, limit, comment):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", limit)
    path = write_zip(tmp_path / "a.zip", {f"{i}.jpg": b"A" for i in range(3)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = comment
    assert len(read(path)[0]) == 3
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") - 51 + 32] = 51  # the second last has a comment: the last
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged zip \\(3 of 4 entries\\): download it again"):
        read(path)


@pytest.mark.parametrize("name", ["nowhere", "nowhere-*.tar", "a.tar,b.tar"])
def test_missing_source_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve_source(str(tmp_path / name))


def test_huge_file_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("input_pipeline.archive.MAX_FILE_BYTES", 1000)
    images, skipped = read(write_zip(tmp_path / "faces.zip"))
    assert "c.png" not in images and skipped["c.png"] == "file larger than 256 MiB"


def test_parts_of_a_source_make_up_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("input_pipeline.archive.PART_FILES", 2)
    sources = [
        write_folder(tmp_path / "folder"),
        write_zip(tmp_path / "faces.zip"),
        write_tar(tmp_path / "faces.tar"),
    ]
    for source in (*sources, sources):
        skipped = {}
        parts = [dict(iter_part(p, on_skip=skipped.__setitem__)) for p in split_source(source)]
        assert sum(map(len, parts)) == len({name for part in parts for name in part})
        assert ({k: v for part in parts for k, v in part.items()}, skipped) == read(source)
    assert len(split_source(sources)) == 4 + 4 + 1


def test_listing_reads_no_file_and_stops_at_its_limit(tmp_path):
    path = write_zip(tmp_path / "faces.zip")
    others = {"not an image file": 1, "empty file": 1, "macOS metadata": 2}
    assert list_files(path) == (["UTKFace/a.jpg", "UTKFace/b.JPEG", "c.png"], others)
    assert list_files(path, limit=1)[0] == ["UTKFace/a.jpg"]
    write_zip(tmp_path / "t.zip", {"a.csv": b"x", "b/B.CSV": b"y", "._c.csv": b"z", "d.jpg": b"d"})
    assert read_tables(tmp_path / "t.zip") == {"a.csv": b"x", "b/B.CSV": b"y"}


def test_file_packed_too_tightly_is_skipped(tmp_path):
    files = {"bomb.jpg": bytes(3 << 20), "small.jpg": bytes(1 << 20), "a.jpg": b"A"}
    path = write_zip(tmp_path / "bomb.zip", files, compression=zipfile.ZIP_DEFLATED)
    images, skipped = read(path)
    assert list(images) == ["small.jpg", "a.jpg"]
    assert skipped["bomb.jpg"].startswith("packed more tightly than a picture can be (")
    files = {"bomb.csv": b",\n" * (1 << 20), "a.csv": b"file,age"}
    write_zip(path, files, compression=zipfile.ZIP_DEFLATED)
    assert read_tables(path) == {"a.csv": b"file,age"}


def test_file_larger_than_it_says_is_refused(tmp_path):
    path = write_zip(
        tmp_path / "liar.zip", {"a.jpg": b"A" * 5000}, compression=zipfile.ZIP_DEFLATED
    )
    data = path.read_bytes().replace((5000).to_bytes(4, "little"), (50).to_bytes(4, "little"))
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        read(path)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_archive_that_unpacks_to_hundreds_of_times_its_size_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("input_pipeline.archive.MAX_FILE_BYTES", 2 << 20)
    files = {f"{i}.jpg": bytes(1 << 20) for i in range(4)}
    if kind == "zip":
        path = write_zip(tmp_path / "bomb.zip", files, compression=zipfile.ZIP_DEFLATED)
    else:
        path = write_tar(tmp_path / "bomb.tgz", files, mode="w:gz")
    with pytest.raises(ValueError, match="refused as a decompression bomb") as error:
        read(path)
    assert "\n" not in str(error.value)
    assert len(read(write_tar(tmp_path / "plain.tar", files))[0]) == 4
