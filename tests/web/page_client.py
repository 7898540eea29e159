"""A browser without scripts, and the prompt template."""

import re
from typing import Any

from starlette.testclient import TestClient

HH = "\n\nHuman: {}\n\nAssistant:"


class Client(TestClient):
    """A browser without scripts, on this machine."""

    def __init__(self, app: Any, **options: Any) -> None:
        options = {"base_url": "http://127.0.0.1:8000", "client": ("127.0.0.1", 50000), **options}
        super().__init__(app, raise_server_exceptions=False, **options)
        self._csrf: dict[str, str] = {}  # by cookies: one page load per login

    def csrf(self, path: str = "/login") -> str:
        """The CSRF token in the forms of a page."""
        return self.csrf_in(self.get(path).text)

    @staticmethod
    def csrf_in(page: str) -> str:
        """The CSRF token in a page's HTML."""
        found = re.search(r'name="csrf" value="(\w+)"', page)
        assert found
        return found[1]

    def submit(self, path: str, *, as_json: bool = True, **fields: Any) -> Any:
        """Posts a form with the CSRF token of this browser and the id of the store."""
        accept = "application/json" if as_json else "text/html"
        cookies = str(self.cookies)
        if cookies not in self._csrf:
            self._csrf[cookies] = self.csrf("/model")
        hidden = {"csrf": self._csrf[cookies], "store_id": self.app.state.store_id}  # type: ignore[attr-defined]
        return self.post(path, data=hidden | fields, headers={"accept": accept})

    def enter(self, name: str = "me") -> "Client":
        """Starts under a name, on a page without logins."""
        assert self.post("/name", data={"csrf": self.csrf(), "name": name}).status_code == 200
        return self

    def log_in(self, name: str, password: str) -> Any:
        return self.post("/login", data={"csrf": self.csrf(), "name": name, "password": password})
