"""The files in deploy/, each checked by the program that will read it."""

from __future__ import annotations

import configparser
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Run, message_xml, skip
from serving import gunicorn, nginx_site, until

import wechat.config

SYSTEMD = shutil.which("systemd-analyze")


def test_a_message_comes_through_the_nginx_site_and_its_log_has_no_signature(
    run: Run, tmp_path: Path
) -> None:
    server = gunicorn(run, tmp_path, WEB_CONCURRENCY="1").ready()
    with nginx_site(server, tmp_path) as site:
        assert until(lambda: server.ask(base=site.base, echostr="437512")) == (200, b"437512")
        assert b"hello" in server.ask(message_xml("hello"), base=site.base, openid="oPrivate")[1]
        assert server.ask(b" " * 1_100_000, base=site.base)[0] == 413
        assert server.ask(path="/other", base=site.base)[0] == 404
        with socket.create_connection(("127.0.0.1", site.http)) as connection:
            connection.sendall(b"GET /wx HTTP/1.0\r\nHost: wx.example.com\r\n\r\n")
            assert b"Location: https://wx.example.com/wx" in connection.recv(4096)
    log = (tmp_path / "wxserver.log").read_text()
    assert "POST /wx 200" in log
    assert "signature" not in log
    assert "oPrivate" not in log


def test_nginx_takes_the_locations_of_the_other_programs_as_they_are_shipped(
    run: Run, tmp_path: Path
) -> None:
    server = gunicorn(run, tmp_path, WEB_CONCURRENCY="1").ready()
    shipped = (ROOT / "deploy" / "nginx-central.conf").read_text()
    inside = tmp_path / "central.conf"
    inside.write_text(shipped.replace("/var/log/nginx", str(tmp_path)))  # which may be root's alone
    include = "# include /etc/nginx/wxserver-central.conf;"
    with nginx_site(server, tmp_path, {include: f"include {inside};"}) as site:
        assert server.ask(path="/cgi-bin/token", base=site.base)[0] == 403


def test_systemd_takes_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    if not SYSTEMD:
        skip("needs systemd")
    unit = (ROOT / "deploy" / "wxserver@.service").read_text()
    # An account and a program that are on every machine, for what is checked is the unit.
    unit = unit.replace("=wxserver\nGroup=wxserver", "=daemon\nGroup=daemon")
    unit = unit.replace("/opt/wxserver/.venv/bin/gunicorn", "/bin/true")
    path = tmp_path / "wxserver@shop.service"
    path.write_text(unit)
    verify = [SYSTEMD, "verify", str(path)]
    result = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert "wxserver@shop.service" not in result.stdout + result.stderr
    assert result.returncode == 0, result.stderr
    security = [SYSTEMD, "security", "--offline=true", "--threshold=20", str(path)]
    result = subprocess.run(security, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_shipped_config_of_the_service_is_valid() -> None:
    config = wechat.config.load(ROOT / "deploy" / "config.ini", {})
    assert config.state_dir == Path("/var/lib/wxserver/NAME")


def test_an_instance_has_the_config_secrets_and_folders_of_its_account() -> None:
    unit = (ROOT / "deploy" / "wxserver@.service").read_text().splitlines()
    for line in (
        "WorkingDirectory=/opt/wxserver",
        "Environment=WXSERVER_CONFIG=/etc/wxserver/%i/config.ini",
        "EnvironmentFile=/etc/wxserver/%i/environment",
        "StateDirectory=wxserver/%i",
        "RuntimeDirectory=wxserver/%i",
        "Type=notify",
        "ExecStart=/opt/wxserver/.venv/bin/gunicorn wxserver",
        "ExecReload=/opt/wxserver/.venv/bin/gunicorn --check-config wxserver",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "Restart=always",
    ):
        assert line in unit


def test_every_module_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    modules = {path.stem for path in ROOT.glob("*.py")} - {"gunicorn.conf"}
    assert set(setup["options"]["py_modules"].split()) == modules
    packages = {path.parent.name for path in ROOT.glob("w*/__init__.py")}
    assert set(setup["options"]["packages"].split()) == packages


@pytest.mark.parametrize(
    ("target", "extras"),
    [("install", "'.[safe,redis]'"), ("run", "'.[safe,redis]'"), ("test", "'.[safe,redis,dev]'")],
)
def test_only_tests_and_checks_install_what_they_need(target: str, extras: str) -> None:
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", target]
    commands = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installs = [line for line in commands.splitlines() if "pip install" in line]
    assert installs[-1].endswith(f"--editable {extras}")


def test_the_environment_file_names_what_the_config_reads() -> None:
    lines = (ROOT / "deploy" / "environment").read_text().splitlines()
    names = {line.partition("=")[0] for line in lines if not line.startswith("#")}
    settings = [each for keys in wechat.config.settings().values() for each in keys.values()]
    assert names == {setting.environment for setting in settings} - {""} | {"GUNICORN_CMD_ARGS"}


def shell(page: str, words: str) -> list[str]:
    """Return the commands of the shell example of a page in which ``words`` stand."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return next(str(block) for block in blocks if words in block).splitlines()


def test_what_is_copied_to_opt_is_what_runs(tmp_path: Path) -> None:
    [copy] = [line for line in shell("README.md", "useradd") if line.startswith("tar ")]
    subprocess.run(
        ["sh", "-ec", copy.replace("/opt/wxserver", str(tmp_path))], cwd=ROOT, check=True
    )
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"wxserver.py", "gunicorn.conf.py", "once.py", "wxrun", "Makefile"} <= names
    assert not {".git", "__pycache__", "tests", "bench", ".venv", "state"} & names


def test_a_second_account_has_a_path_port_and_folder_of_its_own(tmp_path: Path) -> None:
    site = tmp_path / "etc/nginx/sites-enabled/wxserver"
    site.parent.mkdir(parents=True)
    shutil.copy(ROOT / "deploy" / "nginx.conf", site)
    commands = shell("docs/deploying.md", "news")
    files = [line for line in commands if line.startswith(("install ", "sed "))]
    script = "\n".join(files).replace("/etc/", f"{tmp_path}/etc/")
    subprocess.run(["sh", "-ec", script], cwd=ROOT, check=True)
    account = tmp_path / "etc/wxserver/news"
    config = wechat.config.load(account / "config.ini", {})
    assert (config.path, config.state_dir) == ("/news", Path("/var/lib/wxserver/news"))
    assert "\nGUNICORN_CMD_ARGS=--bind=127.0.0.1:8001\n" in (account / "environment").read_text()
    assert (account / "environment").stat().st_mode & 0o777 == 0o600
    for location in (
        "= /wx { proxy_pass http://127.0.0.1:8000;",
        "= /news { proxy_pass http://127.0.0.1:8001;",
    ):
        assert f"    location {location} }}\n" in site.read_text()


def test_wxrun_runs_a_program_with_the_config_and_secrets_of_an_account(tmp_path: Path) -> None:
    wxrun = (ROOT / "deploy" / "wxrun").read_text()
    become = "setpriv --reuid=wxserver --regid=wxserver --clear-groups .venv/bin/python"
    for old, new in (
        (become, sys.executable),  # only root can become another user
        ("/etc/wxserver", str(tmp_path)),
        ("/opt/wxserver", str(ROOT)),
    ):
        assert old in wxrun
        wxrun = wxrun.replace(old, new)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "config.ini").write_text("[server]\npath = /shop\n")
    (tmp_path / "shop" / "environment").write_text("WX_TOKEN=ofShop\n")
    show = "import wechat.config as c; print(c.load().path, c.load().token)"
    result = subprocess.run(
        ["sh", "-c", wxrun, "wxrun", "shop", "-c", show],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "/shop ofShop\n", result.stderr
    result = subprocess.run(["sh", "-c", wxrun], capture_output=True, text=True, check=False)
    assert "wxrun NAME PROGRAM" in result.stderr
