"""``clmerge sign``: sign a file or a folder with a key."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from clmerge.cli.messages import complain
from clmerge.names import tell

EPILOG = """\
examples:
  openssl ecparam -name prime256v1 -genkey -noout -out private.pem
  openssl ec -in private.pem -pubout -out public.pem
  clmerge sign merged.safetensors --key private.pem
  clmerge sign runs/digits/model --key private.pem --out digits.sig
  clmerge sign runs/digits/model --check public.pem --out digits.sig
  clmerge merge --verify merged.safetensors --key public.pem
"""


def build_parser() -> ArgumentParser:
    """Return the parser of ``clmerge sign``."""
    parser = ArgumentParser(
        prog="clmerge sign",
        usage="clmerge sign PATH --key PRIVATE.pem [--out SIGNATURE]\n"
        "       clmerge sign PATH --check PUBLIC.pem [--out SIGNATURE]",
        description="Sign a file, or all files of a folder, with a key and without a network, by OpenSSF's model "
        "signing. It needs its package: pip install 'clmerge[signing]'.",
        epilog=EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="PATH", help="The file or folder.")
    key_help = "A private key in PEM, on P-256, P-384 or P-521, without a password."
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--key", metavar="FILE", help=key_help)
    which.add_argument("--check", metavar="FILE", help="Check the signature by this public key in PEM; write nothing.")
    parser.add_argument("--out", default=None, metavar="FILE", help="The signature (default: PATH.sig).")
    parser.add_argument("--overwrite", action="store_true", help="Replace the signature if it exists.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge sign``; return the exit code."""
    from clmerge.checkpoints.signing import check_signature, sign, signature_path

    arguments = build_parser().parse_args(argv)
    signature = signature_path(arguments.path) if arguments.out is None else Path(arguments.out)
    try:
        if arguments.check is not None:
            if (wrong := check_signature(arguments.path, arguments.check, signature)) is not None:
                tell(f"clmerge sign: {wrong}")
                return 1
            tell(f"{arguments.path} is what {signature} signs with {arguments.check}", file=sys.stdout)
            return 0
        if signature.exists() and not arguments.overwrite:
            raise FileExistsError(f"expected a new file, got {signature}, which exists; name another or --overwrite")
        sign(arguments.path, arguments.key, signature)
    except (ValueError, OSError) as error:
        return complain("sign", error)
    tell(f"signed    {signature}", file=sys.stdout)
    return 0
