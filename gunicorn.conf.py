"""gunicorn's settings for one or two cores and 512 MB.

GUNICORN_CMD_ARGS and the command line win over this file; WEB_CONCURRENCY is the number of workers.
"""

import logging
import os
import sys

# Two workers, so that one may die or be busy. Threads, because a reply() may wait for seconds
# on a database or another API. A slow reply holds two of them: one runs it, and one has WeChat's
# next try, which waits for the answer. With these, 400 slow replies at once are all answered. A
# thread that was never needed is never started. A client that sends its request slowly holds a
# thread as well. nginx waits for the whole request, so it stands in front, and gunicorn listens on
# 127.0.0.1.
if "WEB_CONCURRENCY" not in os.environ:
    workers = 2
worker_class = "gthread"
threads = 512

# Heartbeats are a file's timestamps; on a disk they can stall, and a stalled worker is killed.
if os.path.isdir("/dev/shm"):
    worker_tmp_dir = "/dev/shm"

# Nobody steers this server over a socket. systemctl and signals do.
control_socket_disable = True

# No request may say under which path this is mounted; gunicorn would believe whoever is local.
forwarder_headers = ""

# One line a request, of what no stranger can fill with anything: not the query, which has the
# signature and the follower's OpenID, not the path, no header. nginx logs the address.
accesslog = "-"
access_log_format = "%(t)s [%(p)s] %(h)s %(m)s %(s)s %(B)s bytes %(M)s ms"

# The server's own log lines, in the form of gunicorn's.
logging.basicConfig(
    level=logging.INFO,
    format="%(asctime)s [%(process)d] [%(levelname)s] %(message)s",
    datefmt="[%Y-%m-%d %H:%M:%S %z]",
)


def _without_request(record: logging.LogRecord) -> bool:
    """Take out of a line about a malformed request what was sent, which may hold a secret."""
    line = record.getMessage()
    if line.startswith(("Invalid request from", "Error handling request")):
        # "Invalid request from ip=ADDRESS: Invalid HTTP request line: '…'", "… request GET /wx?…"
        record.msg, record.args = ": ".join(line.split(": ")[:2]).partition("?")[0], ()
    return True


logging.getLogger("gunicorn.error").filters = [_without_request]  # and no second one on a reload


def _check_config() -> None:
    """Let a wrong config.ini stop the start and ``gunicorn --check-config`` with one line."""
    import wechat.config
    from wechat import crypto

    try:
        config = wechat.config.load()
        crypto.from_config(config)
        wechat.config.callback_token(config)
        if config.redis:
            from wechat import redis_store

            redis_store.check(config)
    except wechat.config.ConfigError as error:
        sys.exit(f"wxserver: {error}")


# gunicorn reads this file before it looks for modules in its folder.
sys.path.insert(0, os.path.dirname(__file__))
_check_config()
