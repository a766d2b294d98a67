"""Images for a cluster: archives that `ctr images import` takes, made without a builder and without a registry."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

THIN = "localhost/mlpipes-thin:1"
"""An empty root for the host's programs: mount points, links and user names, but no software."""
_FOLDERS = ("usr", "etc", "tmp", "root", "home", "var", "var/tmp", "opt", "run", "dev", "proc", "sys", "mnt", "store")
_LINKS = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64", "var/run": "../run"}
_TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nray:x:1000:1000::/tmp:/bin/sh\nnobody:x:65534:65534::/tmp:/bin/sh\n",
    "etc/group": "root:x:0:\nray:x:1000:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}


def thin_image(path: Path) -> None:
    """The image whose containers mount the host's programs."""
    _image(path, THIN, programs={}, entry=["/bin/sh"], root=True)


def program_image(path: Path, name: str, program: Path, entry: str) -> None:
    """An image of one statically linked program, which lies at `entry` in it."""
    _image(path, name, programs={entry.lstrip("/"): program}, entry=[entry], root=False)


def _image(path: Path, name: str, programs: dict[str, Path], entry: list[str], root: bool) -> None:
    layer = path.with_suffix(".layer")
    with tarfile.open(layer, "w") as archive:
        for folder in _FOLDERS if root else ("tmp",):
            entry_info = tarfile.TarInfo(folder)
            entry_info.type, entry_info.mode = tarfile.DIRTYPE, 0o1777 if folder.endswith(("tmp", "store")) else 0o755
            archive.addfile(entry_info)
        for link, target in _LINKS.items() if root else ():
            entry_info = tarfile.TarInfo(link)
            entry_info.type, entry_info.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry_info)
        for file, text in _TEXTS.items() if root else ():
            _add(archive, file, text.encode())
        for file, program in programs.items():
            archive.add(program, file, recursive=False)
    with layer.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    configuration = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": entry, "User": "0" if root else "65532:65532"},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    config_name = f"{hashlib.sha256(configuration).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": [f"{digest}/layer.tar"]}]
    with tarfile.open(path, "w") as archive:
        _add(archive, config_name, configuration)
        archive.add(layer, f"{digest}/layer.tar")
        _add(archive, "manifest.json", json.dumps(manifest).encode())
    layer.unlink()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    archive.addfile(info, io.BytesIO(content))
