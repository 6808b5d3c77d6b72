"""The page at `/`: one file, served under a policy that lets it fetch nothing from elsewhere."""

import secrets
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from sana_cli.server.security import PAGE_POLICY

PAGE = Path(__file__).with_name("page.html")


def add(app: FastAPI) -> None:
    """Serve the page. Its script and its style carry a number that is used once."""
    text = PAGE.read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        headers = {
            "Content-Security-Policy": PAGE_POLICY.format(nonce=nonce),
            "Cache-Control": "no-store",
        }
        return HTMLResponse(text.replace("{{nonce}}", nonce), headers=headers)
