"""A PostgreSQL server for tests: on loopback, with a password, in its own folder."""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PASSWORD = "correct-horse-battery"


def program(name: str) -> str | None:
    """A program of PostgreSQL; Debian keeps them off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


@dataclass(frozen=True)
class Server:
    folder: Path
    port: int

    @property
    def url(self) -> str:
        return f"postgresql://tester@127.0.0.1:{self.port}/postgres"

    @staticmethod
    def driven(url: str) -> str:
        """A URL with the driver that Optuna is to use."""
        return url.replace("postgresql://", "postgresql+psycopg://")

    def control(self, *arguments: str) -> None:
        """Runs pg_ctl; the server refuses to run as root."""
        as_user = ["runuser", "-u", "nobody", "--"] if os.getuid() == 0 else []
        subprocess.run(
            [*as_user, str(program("pg_ctl")), "-D", f"{self.folder}/data", *arguments],
            cwd=self.folder,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=60,
        )

    def begin(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder}"
        self.control("-w", "-l", f"{self.folder}/log", "-o", options, "start")

    def stop(self) -> None:
        self.control("-m", "immediate", "stop")


def free_port() -> int:
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a password on loopback, in a folder of its own."""
    if program("initdb") is None:
        pytest.skip("needs PostgreSQL's initdb and pg_ctl")
    folder = Path("/tmp") / f"postgresql-of-tests-{os.getpid()}"
    folder.mkdir()
    as_user: list[str] = []
    if os.getuid() == 0:
        shutil.chown(folder, "nobody")
        as_user = ["runuser", "-u", "nobody", "--"]
    secret = folder / "secret"
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    initdb = [str(program("initdb")), "-D", f"{folder}/data", "-U", "tester"]
    initdb += ["-A", "scram-sha-256", f"--pwfile={secret}", "--no-sync"]
    subprocess.run([*as_user, *initdb], cwd=folder, check=True, capture_output=True)
    one = Server(folder, free_port())
    one.begin()
    os.environ["PGPASSWORD"] = PASSWORD
    try:
        yield one
    finally:
        del os.environ["PGPASSWORD"]
        with contextlib.suppress(subprocess.CalledProcessError):
            one.stop()
        shutil.rmtree(folder)
