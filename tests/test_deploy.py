"""The files in deploy/, each checked by the program that will read it."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Run, message_xml
from serving import free_port, gunicorn, until

import wxconfig

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")
SYSTEMD = shutil.which("systemd-analyze")


# .ci/run installs what these two need; to run or to edit the server, nobody needs it.
@pytest.mark.skipif(not NGINX or not shutil.which("openssl"), reason="needs nginx and openssl")
def test_a_message_comes_through_the_nginx_site_and_its_log_has_no_signature(
    run: Run, tmp_path: Path
) -> None:
    assert NGINX
    server = gunicorn(run, tmp_path, WEB_CONCURRENCY="1").ready()
    http, https = free_port(), free_port()
    key, certificate = tmp_path / "privkey.pem", tmp_path / "fullchain.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=a.example"]
    make += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    site = (ROOT / "deploy" / "nginx.conf").read_text()
    for old, new in {
        "/etc/letsencrypt/live/wx.example.com": str(tmp_path),
        "/var/log/nginx": str(tmp_path),
        "127.0.0.1:8000": f"127.0.0.1:{server.port}",
        "listen [::]:80;": "",
        "listen [::]:443 ssl;": "",
        "listen 80;": f"listen 127.0.0.1:{http};",
        "listen 443 ssl;": f"listen 127.0.0.1:{https} ssl;",
    }.items():
        assert old in site
        site = site.replace(old, new)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {tmp_path}/{kind}; " for kind in kinds)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; error_log {tmp_path}/error.log; daemon off; events {{}}"
        f" http {{ access_log off; {folders} {site} }}"
    )
    arguments = [NGINX, "-e", f"{tmp_path}/error.log", "-c", str(tmp_path / "nginx.conf")]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as nginx:
        try:
            until(lambda: nginx.poll() is not None or (tmp_path / "pid").exists())
            assert nginx.poll() is None, nginx.stderr and nginx.stderr.read()
            base = f"https://127.0.0.1:{https}"
            assert until(lambda: server.ask(base=base, echostr="437512")) == (200, b"437512")
            assert b"hello" in server.ask(message_xml("hello"), base=base, openid="oPrivate")[1]
            assert server.ask(b" " * 1_100_000, base=base)[0] == 413
            assert server.ask(path="/other", base=base)[0] == 404
            with socket.create_connection(("127.0.0.1", http)) as connection:
                connection.sendall(b"GET /wx HTTP/1.0\r\nHost: wx.example.com\r\n\r\n")
                assert b"Location: https://wx.example.com/wx" in connection.recv(4096)
        finally:
            nginx.terminate()
    log = (tmp_path / "wxserver.log").read_text()
    assert "POST /wx 200" in log
    assert "signature" not in log
    assert "oPrivate" not in log


@pytest.mark.skipif(not SYSTEMD, reason="needs systemd")
def test_systemd_takes_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    assert SYSTEMD
    unit = (ROOT / "deploy" / "wxserver.service").read_text()
    # An account and a program that are on every machine, for what is checked is the unit.
    unit = unit.replace("=wxserver\nGroup=wxserver", "=daemon\nGroup=daemon")
    unit = unit.replace("/opt/wxserver/.venv/bin/gunicorn", "/bin/true")
    path = tmp_path / "wxserver.service"
    path.write_text(unit)
    verify = [SYSTEMD, "verify", str(path)]
    result = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert "wxserver.service" not in result.stdout + result.stderr
    assert result.returncode == 0, result.stderr
    security = [SYSTEMD, "security", "--offline=true", "--threshold=20", str(path)]
    result = subprocess.run(security, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_shipped_config_of_the_service_is_valid() -> None:
    config = wxconfig.load(ROOT / "deploy" / "config.ini", {})
    assert config.state_dir == Path("/var/lib/wxserver")


def test_the_unit_runs_the_server_with_the_config_secrets_and_folder_of_the_readme() -> None:
    unit = (ROOT / "deploy" / "wxserver.service").read_text().splitlines()
    for line in (
        "WorkingDirectory=/opt/wxserver",
        "Environment=WXSERVER_CONFIG=/etc/wxserver/config.ini",
        "EnvironmentFile=-/etc/wxserver/environment",
        "StateDirectory=wxserver",
        "RuntimeDirectory=wxserver",
        "ExecStartPre=-/bin/ln -sfnT /run/wxserver /var/lib/wxserver/replies",
        "Type=notify",
        "ExecStart=/opt/wxserver/.venv/bin/gunicorn wxserver",
        "ExecReload=/opt/wxserver/.venv/bin/gunicorn --check-config wxserver",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "Restart=always",
    ):
        assert line in unit


def test_every_module_is_installed() -> None:
    listed = (ROOT / "pyproject.toml").read_text().partition("py-modules = [")[2].partition("]")[0]
    modules = {path.stem for path in ROOT.glob("*.py")} - {"gunicorn.conf"}
    assert set(listed.replace('"', "").replace(",", "").split()) == modules


def test_the_environment_file_names_what_the_config_reads() -> None:
    lines = (ROOT / "deploy" / "environment").read_text().splitlines()
    names = {line.partition("=")[0] for line in lines if not line.startswith("#")}
    assert names == set(wxconfig._ENVIRONMENT)
