"""WeChat's side, for trying a bot and looking at an account: ``python -m wxsim --help``."""
