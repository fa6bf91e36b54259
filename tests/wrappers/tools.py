"""The tools: how each one is installed in a place, and how it is told which terraform to run."""

import functools
import http.server
import os
import pathlib
import pwd
import re
import shutil
import subprocess
import threading
import zipfile

from around import LEAVES, MAY_LEAVE, RELEASES, ROOT, TERRAFORM, check

HERE = pathlib.Path(__file__).resolve().parent
INSTALLED = ROOT / "target/tools/wrappers"
PYTHON = INSTALLED / "python/bin/python3"

# What becomes of the terraform below tf when its tool is told to stop, or is killed.
STOPS, GOES_ON = "terraform stops", "terraform goes on"


class Tool:
    """A tool below which `tf` runs. `program` is the terraform that it is to run."""

    name = version = ""
    # For each signal to the tool: what bare terraform does with its lock, and what becomes of terraform below tf.
    ends = {}

    def prepare(self, place):
        (place.work / "main.tf").write_text(place.configuration())
        place.run([TERRAFORM, "init", "-no-color"], check=True)

    def environment(self, program):
        return {}

    def command(self, place, program):
        raise NotImplementedError

    def before_next(self, place):
        """What a person has to do before the next run, after the tool was killed."""

    def plain(self, text):
        """The output without what the tool itself shows differently each time."""
        return text


class PythonTool(Tool):
    """A library; a program of a few lines uses it."""

    ends = {
        "INT to the tool": (LEAVES, STOPS),
        "TERM to the tool": (LEAVES, STOPS),
        "TERM to the tool, CI": (None, STOPS),
        "^C at its terminal": (MAY_LEAVE, STOPS),
        "KILL of the tool": (LEAVES, STOPS),
    }

    def command(self, place, program):
        return [PYTHON, HERE / f"with_{self.name.replace('-', '_')}.py", program, place.work]


class Tftest(PythonTool):
    name, version = "tftest", "1.8.8"


class PythonTerraform(PythonTool):
    name, version = "python-terraform", "0.10.1"


class Tflocal(Tool):
    """It has fewer ends than the others, because each of its runs loads the AWS provider."""

    name, version = "tflocal", "0.27.0"
    ends = {
        "INT to the tool": (RELEASES, STOPS),
        "TERM to the tool": (None, GOES_ON),
        # Terraform gets the terminal's interrupt and another one from tflocal.
        "^C at its terminal": (MAY_LEAVE, STOPS),
        "KILL of the tool, CI": (None, STOPS),
    }

    def prepare(self, place):
        # tflocal adds a block for the AWS provider to every configuration, so `init` needs that provider. It takes it
        # from where the other tests look for it, or downloads it.
        plugins = [os.environ.get("TF_TEST_PLUGINS"), "/usr/local/share/terraform/plugins",
                   "/usr/share/terraform/plugins", *pathlib.Path("/opt").glob("*")]
        for directory in filter(None, plugins):
            if (pathlib.Path(directory) / "registry.terraform.io/hashicorp/aws").exists():
                (place.home / ".terraformrc").write_text(
                    f'provider_installation {{\n  filesystem_mirror {{\n    path = "{directory}"\n  }}\n}}\n')
                break
        # The names that it derives from localhost are in DNS only.
        place.environment.update({"S3_HOSTNAME": "127.0.0.1", "DISABLE_DEPRECATION_NOTICE": "1"})
        # It sets the endpoints in the backend block. There, terraform puts the bucket into the host name, even of an address.
        text = place.configuration().replace('backend "s3" {', 'backend "s3" {\n    use_path_style = true')
        (place.work / "main.tf").write_text(text)
        place.run([INSTALLED / "python/bin/tflocal", "init", "-no-color"], check=True)

    def environment(self, program):
        return {"TF_CMD": program}

    def command(self, place, program):
        return [INSTALLED / "python/bin/tflocal", "apply", "-auto-approve", "-no-color"]

    def before_next(self, place):
        (place.work / "localstack_providers_override.tf").unlink(missing_ok=True)


class Cdktf(Tool):
    name, version = "cdktf", "0.21.0"
    ends = {
        # It closes terraform's terminal while terraform stops.
        "INT to the tool": (MAY_LEAVE, STOPS),
        "TERM to the tool": (MAY_LEAVE, STOPS),
        "^C at its terminal": (MAY_LEAVE, STOPS),
        "KILL of the tool": (LEAVES, STOPS),
    }

    def prepare(self, place):
        modules = INSTALLED / "cdktf/node_modules"
        for name in ("cdktf.json", "main.js"):
            shutil.copy(HERE / "cdktf" / name, place.work)
        place.environment.update({
            "NODE_PATH": str(modules), "STATE_KEY": place.key, "PROVISIONER": place.waits, "DISABLE_VERSION_CHECK": "1",
            "PATH": f"{place.environment['PATH']}:{pathlib.Path(shutil.which('node')).resolve().parent}",
        })

    def environment(self, program):
        return {"TERRAFORM_BINARY_NAME": program}

    def command(self, place, program):
        return [INSTALLED / "cdktf/node_modules/.bin/cdktf", "deploy", "prod", "--auto-approve"]

    def plain(self, text):
        """Without its progress, and without its layout, which depends on how much output it reads at a time."""
        lines = (line.removeprefix("prod ").strip() for line in text.splitlines())
        progress = re.compile(r"[\u2800-\u28ff] |\d+ Stacks? |prod$|$")
        return "\n".join(line for line in lines if not progress.match(line))


class Tfswitch(Tool):
    """Here `tf` is above: it runs the link that tfswitch makes. A signal to the tool is one to `tf`."""

    name, version = "tfswitch", "0.13.1308"
    ends = {
        "INT to the tool": (RELEASES, STOPS),
        "TERM to the tool": (RELEASES, STOPS),
        "^C at its terminal": (RELEASES, STOPS),
    }

    def prepare(self, place):
        self.switch(place)
        (place.work / "main.tf").write_text(place.configuration())
        place.run(["terraform", "init", "-no-color"], check=True)

    def switch(self, place):
        """Makes the link $bin/terraform with tfswitch, from a mirror on loopback.

        tfswitch keeps the versions below the user's home in /etc/passwd, and ignores HOME. So a mount puts the place's
        own home there while it runs.
        """
        home = pathlib.Path(pwd.getpwuid(os.getuid()).pw_dir)
        mounted = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
        link, mirror = place.bin / "terraform", Mirror(place.root / "mirror")
        end = place.run([
            "unshare", "--map-root-user", "--mount", "sh", "-c", mounted, "sh", place.home, home,
            INSTALLED / "tfswitch/usr/bin/terraform-switcher", "-m", mirror.url, "-b", link, version(),
        ])
        mirror.stop()
        check(end.returncode == 0 and link.is_symlink(), "tfswitch makes a link", place.log.read_text())
        # The link leads to the directory under the name that it had for tfswitch.
        target = place.home / pathlib.Path(os.readlink(link)).relative_to(home)
        link.unlink()
        link.symlink_to(target)

    def command(self, place, program):
        return [program, "apply", "-auto-approve", "-no-color"]


@functools.cache
def version():
    end = subprocess.run([TERRAFORM, "version"], capture_output=True, text=True, check=True,
                         env={**os.environ, "CHECKPOINT_DISABLE": "1"})
    return end.stdout.split()[1].removeprefix("v")


class Mirror:
    """Serves the terraform of this machine as HashiCorp's release site serves it, on loopback."""

    def __init__(self, directory):
        path = directory / "terraform" / version()
        path.mkdir(parents=True)
        link = f'<a href="/terraform/{version()}/">terraform_{version()}</a>\n'
        (directory / "terraform/index.html").write_text(link)
        with zipfile.ZipFile(path / f"terraform_{version()}_linux_amd64.zip", "w") as archive:
            archive.write(TERRAFORM, "terraform")

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments):
                super().__init__(*arguments, directory=directory)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
        self.url = f"http://127.0.0.1:{self.server.server_port}/terraform"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


# The slowest first.
TOOLS = [Cdktf(), Tflocal(), Tftest(), PythonTerraform(), Tfswitch()]
