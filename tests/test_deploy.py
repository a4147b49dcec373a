"""The files in deploy/, each checked by the program that will read it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

import wxconfig

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")
SYSTEMD = shutil.which("systemd-analyze")


@pytest.mark.skipif(not NGINX or not shutil.which("openssl"), reason="needs nginx and openssl")
def test_nginx_takes_the_site(tmp_path: Path) -> None:
    assert NGINX
    files = [f"-keyout={tmp_path}/privkey.pem", f"-out={tmp_path}/fullchain.pem"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=a"]
    subprocess.run([*make, *" ".join(files).replace("=", " ").split()], check=True, stderr=-3)
    site = (ROOT / "deploy" / "nginx.conf").read_text()
    site = site.replace("/etc/letsencrypt/live/wx.example.com", str(tmp_path))
    site = site.replace("/var/log/nginx", str(tmp_path))
    site = re.sub(r"listen (\[::\]:)?(80|443)", r"listen \g<1>4\2", site)  # no root needed
    (tmp_path / "site.conf").write_text(site)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}"
        f" http {{ include {tmp_path}/site.conf; }}"
    )
    check = [NGINX, "-t", "-c", str(tmp_path / "nginx.conf")]
    result = subprocess.run(check, capture_output=True, text=True, check=False)
    assert "syntax is ok" in result.stderr
    assert result.returncode == 0, result.stderr


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
    security = [SYSTEMD, "security", "--offline=true", "--threshold=20", str(path)]
    result = subprocess.run(security, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_shipped_config_of_the_service_is_valid() -> None:
    config = wxconfig.load(ROOT / "deploy" / "config.ini", {})
    assert config.state_dir == Path("/var/lib/wxserver")


def test_the_environment_file_names_what_the_config_reads() -> None:
    lines = (ROOT / "deploy" / "environment").read_text().splitlines()
    names = {line.partition("=")[0] for line in lines if not line.startswith("#")}
    assert names == set(wxconfig._ENVIRONMENT)
