"""The rules of WeChat's platform, one subject a module: what the files at the top are built of."""
