"""Behind a proxy with TLS: the README's words for nginx and Caddy let everything through."""

import shutil
import socket
import ssl
import subprocess
from contextlib import contextmanager

import httpx2
import pytest

from servers import TINY
from test_server_readme import BLOCKS

NAME, TOKEN = "images.example.org", "correct-horse-battery-staple"
NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/log;
events {{ worker_connections 64; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port} ssl; server_name {name};
    ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;
    {block}
  }}
}}"""


def nginx(folder, port, block) -> list[str]:
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, port=port, name=NAME, block=block))
    return ["nginx", "-c", str(config), "-e", f"{folder}/log"]


def caddy(folder, port, block) -> list[str]:
    block = block.replace(f"{NAME} {{", f"{NAME}:{port} {{\ntls {folder}/cert.pem {folder}/key.pem")
    (folder / "Caddyfile").write_text(f"{{\nadmin off\nauto_https off\n}}\n{block}")
    return ["caddy", "run", "--config", f"{folder}/Caddyfile", "--adapter", "caddyfile"]


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def proxied(served, way, folder, monkeypatch):
    """A client of a proxy before a server."""
    if shutil.which(way.__name__) is None or shutil.which("openssl") is None:
        pytest.skip(f"no {way.__name__} or no openssl on the PATH")
    certificate = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    files = ["-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem"]
    names = ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
    subprocess.run([*certificate, *files, *names], check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    block = {kind or "caddy": text for kind, text in BLOCKS if "proxy" in text}[way.__name__]
    monkeypatch.setenv("HOME", str(folder))
    command = way(folder, port, block.replace("127.0.0.1:7262", "{}:{}".format(*served.address)))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        served.until(lambda: answers(port))
        trusted = ssl.create_default_context(cafile=f"{folder}/cert.pem")
        headers = {"Authorization": f"Bearer {TOKEN}", "Host": NAME}
        client = httpx2.Client(verify=trusted, headers=headers, trust_env=False, timeout=300)
        with client:

            def ask(method: str, path: str, **more) -> httpx2.Response:
                url = f"https://127.0.0.1:{port}{path}"
                known = {"sni_hostname": NAME}
                return client.send(
                    client.build_request(method, url, extensions=known, **more), stream=True
                )

            yield ask
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("way", [nginx, caddy])
def test_events_pass_as_they_happen_and_leaving_cancels(serving, tmp_path, monkeypatch, way):
    with (
        serving("-m", "demo", "--allow-host", NAME, token=TOKEN) as served,
        proxied(served, way, tmp_path, monkeypatch) as ask,
    ):
        assert ask("GET", "/v1/models").status_code == 200
        answer = ask("POST", "/v1/images/generations", json=TINY | {"response_format": "url"})
        answer.read()
        assert answer.json()["data"][0]["url"].startswith(f"https://{NAME}/v1/images/")
        long = TINY | {"steps": 1000, "stream": True, "progress": True}
        answer = ask("POST", "/v1/images/generations", json=long)
        lines = answer.iter_lines()
        assert any("sana.progress" in line for line in lines)  # long before the end
        assert served.jobs()
        answer.close()
        served.until(lambda: not served.jobs())
