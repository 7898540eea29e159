"""Access control of the web page: accounts, passwords, cookies, rate limits and security headers."""
