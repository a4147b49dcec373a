# make run serves, make test proves. Each installs what it needs into .venv: the first what runs, the
# others what tests and checks as well.
PYTHON ?= python3
bin = .venv/bin
pip_install = $(bin)/pip install --quiet --disable-pip-version-check

.PHONY: install run test lint bench bench-peers soak

install: .venv/installed

.venv/installed: setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; this is $$($(PYTHON) --version)" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ echo "No venv; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	$(pip_install) --editable '.[safe,redis]'
	@touch $@

.venv/dev: .venv/installed
	$(pip_install) --editable '.[safe,redis,dev]'
	@touch $@

run: install
	$(bin)/gunicorn wxserver

test: .venv/dev tests/node/node_modules
	$(bin)/pytest

# The tests' client of another language. Without it they say what they skip.
tests/node/node_modules: tests/node/package.json
	@if command -v npm >/dev/null; then \
		npm install --prefix tests/node --silent --no-audit --no-fund --no-package-lock && \
		touch $@ || echo "npm cannot install co-wechat-api; its test is skipped" >&2; fi

lint: .venv/dev
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy

bench: .venv/dev
	$(bin)/python bench/bench.py
	$(bin)/python bench/stores.py
	$(bin)/python bench/followers.py
	$(bin)/python bench/strangers.py

soak: .venv/dev
	$(bin)/python bench/soak.py

# The peers have a venv of their own: nothing of theirs is needed to run or to develop. Their
# versions are the ones of the README's figures.
bench-peers: .venv/dev .venv-peers/installed
	$(bin)/python bench/bench.py --peers .venv-peers/bin/gunicorn

.venv-peers/installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check \
		'gunicorn>=25.1' WeRoBot==1.13.1 'wechatpy[cryptography]==1.8.18' Flask==3.1.3
	@touch $@
