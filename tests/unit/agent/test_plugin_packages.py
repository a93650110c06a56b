"""Packages of plug-ins: fetched despite broken connections, checked, unpacked in a folder."""

import base64
import gzip
import hashlib
import io
import os
import stat
import tarfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fakes.package_server import PackageServer, package_server
from outrider_agent.core.plugins import PluginError
from outrider_agent.plugins.packages import Packages
from outrider_agent.plugins.preparing import prune
from outrider_agent.plugins.unpacking import UnpackError, unpack
from outrider_agent.settings import PluginsSettings
from outrider_agent.tasks.program import Children
from outrider_proto.effective import Plugin, Source

CONTENT = os.urandom(300_000)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PackageServer]:
    with package_server(tmp_path) as found:
        found.files["/p"] = CONTENT
        yield found


@pytest.fixture
async def packages(tmp_path: Path, server: PackageServer) -> AsyncIterator[Callable[..., Packages]]:
    def made(**settings: Any) -> Packages:
        settings = {"ca_file": str(server.ca_file), **settings}
        return Packages(tmp_path / "plugins", PluginsSettings(**settings), Children())

    yield made


def plugin(*urls: str, content: bytes = CONTENT, **source: Any) -> Plugin:
    source.setdefault("sha256", sha256(content))
    return Plugin(name="fim", version="1", source=Source(urls=urls, **source))


async def test_a_package_is_fetched_once(
    server: PackageServer, packages: Any, tmp_path: Path
) -> None:
    have = packages()
    found = await have.have([plugin(server.url("/p"))], ())
    executable = found["fim"].executable
    assert executable.read_bytes() == CONTENT
    assert stat.S_IMODE(executable.stat().st_mode) == 0o755
    assert found["fim"].sha256 == sha256(CONTENT)
    assert await have.have([plugin(server.url("/p"))], ()) == found
    again = packages()  # as after a restart of the agent
    again.clear()
    await again.have([plugin("https://127.0.0.1:1/gone")], ())
    assert len(server.asked) == 1
    assert (tmp_path / "plugins/packages" / sha256(CONTENT)).stat().st_size == len(CONTENT)


async def test_a_cut_connection_is_gone_on_with(server: PackageServer, packages: Any) -> None:
    server.cut = [100_000, 100_000]
    await packages().have([plugin(server.url("/p"))], ())
    assert server.asked == [("/p", ""), ("/p", "bytes=100000-"), ("/p", "bytes=200000-")]


async def test_a_cut_connection_begins_anew_without_ranges(
    server: PackageServer, packages: Any
) -> None:
    server.cut, server.ranges = [100_000], False
    await packages().have([plugin(server.url("/p"))], ())


async def test_the_next_address_goes_on_where_the_first_broke(
    server: PackageServer, packages: Any
) -> None:
    server.cut = [100_000]
    server.files["/mirror"] = CONTENT
    await packages().have([plugin(server.url("/p"), server.url("/mirror"))], ())
    assert server.asked == [("/p", ""), ("/mirror", "bytes=100000-")]


async def test_a_bad_mirror_does_not_spoil_a_good_one(server: PackageServer, packages: Any) -> None:
    server.files["/bad"] = os.urandom(len(CONTENT))
    server.cut = [100_000]
    await packages().have([plugin(server.url("/bad"), server.url("/p"))], ())


async def test_redirects_are_followed_but_not_out_of_https(
    server: PackageServer, packages: Any
) -> None:
    server.moved = {"/latest": "/p", "/out": "http://127.0.0.1:1/p", "/round": "/round"}
    await packages().have([plugin(server.url("/latest"))], ())
    for path, text in (("/out", "not https"), ("/round", "redirected more than 5 times")):
        wanted = plugin(server.url(path), sha256="0" * 64)
        with pytest.raises(PluginError, match=text) as caught:
            await packages().have([wanted], ())
        assert caught.value.reason == "FetchFailed"


async def test_what_cannot_be_had_says_why(server: PackageServer, packages: Any) -> None:
    for wanted, settings, text in (
        (plugin(server.url("/p"), sha256="0" * 64), {}, f"a file of sha256 {sha256(CONTENT)}, exp"),
        (plugin(server.url("/404")), {}, "answered 404"),
        (plugin(server.url("/p")), {"max_package_bytes": 2000}, "at most 2000 .*maxPackageBytes"),
        (plugin(server.url("/p")), {"ca_file": ""}, "certificate"),
        (plugin("https://127.0.0.1:1/p"), {}, "refused"),
    ):
        with pytest.raises(PluginError, match=text) as caught:
            await packages(**settings).have([wanted], ())
        assert caught.value.reason == "FetchFailed"
        assert "plug-in fim" in str(caught.value)


async def test_signatures(server: PackageServer, packages: Any, tmp_path: Path) -> None:
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    pem, raw, wrong = tmp_path / "a.pem", tmp_path / "b.key", tmp_path / "c.pem"
    pem.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    raw.write_bytes(base64.b64encode(other.public_key().public_bytes_raw()) + b"\n")
    elliptic = generate_private_key(SECP256R1()).public_key()
    wrong.write_bytes(elliptic.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    keys = (str(pem), str(raw))
    for signer in (key, other):
        good = base64.b64encode(signer.sign(CONTENT)).decode()
        await packages(public_keys=keys).have([plugin(server.url("/p"), signature=good)], ())
    good = base64.b64encode(key.sign(CONTENT)).decode()
    bad = base64.b64encode(key.sign(CONTENT + b"x")).decode()
    for settings, signature, text, reason in (
        ({"public_keys": keys}, bad, "of none of this node's keys", "BadSignature"),
        ({"public_keys": (str(raw),)}, good, "of none of this node's keys", "BadSignature"),
        ({"public_keys": keys}, "???", "no base64", "BadSignature"),
        ({}, good, "no key to check", "BadSignature"),
        ({"public_keys": (str(wrong),)}, good, "of another kind", "BadSignature"),
        ({"public_keys": ("/none",)}, good, "/none", "BadSignature"),
        ({"public_keys": keys, "require_signature": True}, "", "requireSignature", "NotSigned"),
    ):
        with pytest.raises(PluginError, match=text) as caught:
            await packages(**settings).have([plugin(server.url("/p"), signature=signature)], ())
        assert caught.value.reason == reason


# Unpacking.


def member(name: str, content: bytes = b"", **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = 0o755
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def packed(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


GOOD = member("bin/fim", b"#!/bin/sh\n")


def unpacked(tmp_path: Path, content: bytes, most: int = 10_000_000) -> Path:
    package = tmp_path / "package"
    package.write_bytes(content)
    return unpack(package, "tar.gz", "bin/fim", tmp_path / "in" / "folder", most)


@pytest.fixture(params=["filter", "no filter"])
def tarfile_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module with its filters, and as it was before it had any."""
    if request.param == "filter":
        return
    extract = tarfile.TarFile.extract

    def without(self: Any, member: Any, path: Any = "", set_attrs: bool = True) -> None:
        self.extraction_filter = staticmethod(lambda member, path: member)
        extract(self, member, path, set_attrs)

    monkeypatch.setattr(tarfile.TarFile, "extract", without)


def test_a_name_that_goes_up_through_a_link_stays_inside(tmp_path: Path, tarfile_of: None) -> None:
    here = member("here", type=tarfile.SYMTYPE, linkname=".")
    unpacked(tmp_path, packed(here, member("here/../stray", b"x"), GOOD))
    assert (tmp_path / "in" / "folder" / "stray").read_bytes() == b"x"
    assert not (tmp_path / "in" / "stray").exists()


def test_modes_of_a_package_are_our_own(tmp_path: Path, tarfile_of: None) -> None:
    executable = unpacked(
        tmp_path,
        packed(
            member("bin", type=tarfile.DIRTYPE, mode=0o777),
            member("bin/fim", b"#!/bin/sh\n", mode=0o6777, uid=12345),
            member("bin/data", b"x", mode=0o666),
        ),
    )
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (executable, *executable.parents[:1])}
    assert modes == {"fim": 0o755, "bin": 0o755}
    assert stat.S_IMODE((executable.parent / "data").stat().st_mode) == 0o644
    assert executable.stat().st_uid == os.geteuid()


def test_a_package_with_links_inside_is_unpacked(tmp_path: Path, tarfile_of: None) -> None:
    executable = unpacked(
        tmp_path,
        packed(
            member("bin", type=tarfile.DIRTYPE),
            GOOD,
            member("bin/again", type=tarfile.SYMTYPE, linkname="fim"),
            member("lib/same", type=tarfile.LNKTYPE, linkname="bin/fim"),
            member("setuid", b"x", mode=0o6777, uid=0),
        ),
    )
    folder = executable.parent.parent
    assert (folder / "bin/again").resolve() == executable
    assert (folder / "lib/same").read_bytes() == b"#!/bin/sh\n"
    assert stat.S_IMODE((folder / "setuid").stat().st_mode) == 0o755  # no setuid, not for others


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ([member("../evil", b"x")], "outside"),
        ([member("/etc/evil", b"x")], "outside"),
        ([member("a/../../evil", b"x")], "outside"),
        ([member("l", type=tarfile.SYMTYPE, linkname="/etc")], "leads out"),
        ([member("l", type=tarfile.SYMTYPE, linkname="../../etc")], "leads out"),
        ([member("a/l", type=tarfile.SYMTYPE, linkname="../../x")], "leads out"),
        ([member("h", type=tarfile.LNKTYPE, linkname="../package")], "leads out"),
        ([member("h", type=tarfile.LNKTYPE, linkname="/etc/passwd")], "leads out"),
        (
            [
                member("here", type=tarfile.SYMTYPE, linkname="."),
                member("l", type=tarfile.SYMTYPE, linkname="here/../x"),
            ],
            "leads out",
        ),
        (
            [
                member("here", type=tarfile.SYMTYPE, linkname="."),
                member("h", type=tarfile.LNKTYPE, linkname="here/package"),
            ],
            "hard link to a link",
        ),
        (
            [
                member("d", type=tarfile.DIRTYPE),
                member("l", type=tarfile.SYMTYPE, linkname="d"),
                member("l/evil", b"x"),
            ],
            "through a link",
        ),
        (
            [member("l", type=tarfile.SYMTYPE, linkname="d"), member("l", b"x")],
            "through a link",
        ),
        ([member("dev", type=tarfile.CHRTYPE, devmajor=1, devminor=3)], "no file, folder or link"),
        ([member("fifo", type=tarfile.FIFOTYPE)], "no file, folder or link"),
        ([member(f"f{n}") for n in range(10_001)], "more than 10000 members"),
        ([member("big", bytes(11_000_000))], "more than 10000000 bytes"),
        ([member("other", b"x")], "holds no file 'bin/fim'"),
        ([member("bin/fim", type=tarfile.SYMTYPE, linkname="../x"), member("x")], "holds no file"),
    ],
)
def test_what_would_leave_the_folder_is_refused(
    tmp_path: Path, tarfile_of: None, members: Any, text: str
) -> None:
    extra = [] if "holds no file" in text else [GOOD]
    with pytest.raises(UnpackError, match=text):
        unpacked(tmp_path, packed(*members, *extra))
    assert {p.name for p in tmp_path.iterdir()} <= {"package", "in"}
    assert not list(tmp_path.glob("in/*evil"))


def test_what_is_no_archive_or_claims_much_is_refused_in_little_memory(tmp_path: Path) -> None:
    for number, content in enumerate(
        (b"", b"x" * 1000, packed(GOOD)[:-20], gzip.compress(b"x" * 600))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UnpackError):
            unpacked(folder, content)
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 4 * 1024**3
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as file:
        file.write(header.tobuf())
        file.write(bytes(64 * 1024 * 1024))
    with pytest.raises(UnpackError, match="claims"):
        unpacked(tmp_path, out.getvalue())


async def test_a_bad_package_says_so_and_leaves_nothing(
    server: PackageServer, packages: Any, tmp_path: Path
) -> None:
    server.files["/t"] = packed(member("../evil", b"x"))
    wanted = plugin(server.url("/t"), content=server.files["/t"], format="tar.gz")
    with pytest.raises(PluginError, match="is outside of it") as caught:
        await packages().have([wanted], ())
    assert caught.value.reason == "BadPackage"
    assert list((tmp_path / "plugins/unpacked").iterdir()) == []
    server.files["/t"] = packed(GOOD)
    wanted = plugin(
        server.url("/t"), content=server.files["/t"], format="tar.gz", executable="bin/fim"
    )
    found = await packages().have([wanted], ())
    assert found["fim"].executable.read_bytes() == b"#!/bin/sh\n"


def test_packages_not_used_for_longest_go_first(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "used", "older", "oldest", "kept")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    prune(tmp_path, 300, ["kept"])
    assert {path.name for path in tmp_path.iterdir()} == {"new", "used", "kept"}
