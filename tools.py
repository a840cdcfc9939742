"""Small tools: sizes of backbones, weights to publish, bug reports, a script as one file.

count: parameters, multiplications and activations of a backbone, part by part, for one image.
publish: a run's backbone as NAME-HASH.pth, which torch.hub downloads and checks.
env: what a bug report needs to say of machine and versions, in one block.
flatten: a script, and exactly the functions, classes and constants of `common/` that it uses, as
one file that runs anywhere; comments stay. A name that would meet another one is given its module's
name in front.

    python tools.py count resnet50
    python tools.py publish runs/simclr-digits-resnet_tiny --half
    python tools.py env
    python tools.py flatten simclr.py elsewhere/simclr.py
"""

import ast
import builtins
import collections
import hashlib
import importlib.metadata
import io
import math
import os
import platform
import re
import sys
import tokenize
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from common import backbones, checkpoint, cli, distributed as comm, features, weights


def parse_args(argv=None):
    parser = cli.Parser("tools.py", __doc__)
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    add = tools.add_parser
    count = add("count", help="parameters, multiplications and activations of a backbone")
    cli.arch_flag(count, backbones.NAMES, "arch")
    count.add_argument("--image-size", type=cli.pos_int, default=224, help="side in pixels")
    count.add_argument("--in-chans", type=cli.pos_int, default=3, help="channels of the images")
    count.add_argument("--stem", choices=tuple(backbones.STEMS), default="imagenet",
                       help="stem of a ResNet")
    count.add_argument("--patch-size", type=cli.pos_int, default=16,
                       help="side of a transformer's patches")
    count.add_argument("--num-classes", type=cli.pos_int, default=1000,
                       help="outputs of the linear classifier that is counted as well")
    publish = add("publish", help="a run's backbone as NAME-HASH.pth for torch.hub")
    publish.add_argument("run", help="run folder or its backbone.pth")
    publish.add_argument("--name", help="default: the run folder's")
    publish.add_argument("--half", action="store_true", help="halve the file: float16")
    publish.add_argument("--output", default=".", metavar="FOLDER", help="where to write")
    add("env", help="machine and versions for a bug report")
    flat = add("flatten", help="a script and what it uses of common/, as one file")
    flat.add_argument("script", help="simclr.py, moco.py, ..., eval_knn.py, ...")
    flat.add_argument("out", help="file to write")
    flat.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    args = parser.parse_args(argv)
    if args.tool == "count":
        for flag, own in (("--stem", backbones.RESNETS), ("--patch-size", backbones.VITS)):
            if args.arch not in own and (value := cli.peek(argv, flag, str)):
                parser.error(f"{flag} {value} does not belong to {args.arch}; leave it out")
        cli.check_patches(parser, args)
    return args


# -------------------------------------------------------------------------------------------- count


def count_parts(model: nn.Module, image: torch.Tensor) -> dict[str, list[int]]:
    """Count parameters, multiply-adds and activations of a model's parts, by name; "" is the whole.

    Multiply-adds are those of convolutions and matrix products, half of what torch's counter calls
    floating-point operations. Activations are the numbers that come out of them, attention's too.

    Args:
        image: (1, C, H, W), on the model's device, which may be "meta".
    """
    def numbers_out(*_, out_shape, **__):
        return math.prod(out_shape)

    counters = [FlopCounterMode(display=False),
                FlopCounterMode(display=False,
                                custom_mapping=dict.fromkeys(flop_registry, numbers_out))]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # attention as the products that it is
        for counter in counters:
            with counter:
                model(image)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    table = {}
    for part in (*dict.fromkeys(name.partition(".")[0] for name in sizes), ""):
        row = [sum(n for name, n in sizes.items() if part in ("", name.partition(".")[0]))]
        for counter in counters:
            counts = {name.partition(".")[2]: sum(by_operator.values())
                      for name, by_operator in counter.get_flop_counts().items()}
            blocks = [n for name, n in counts.items() if name.rpartition(".")[0] == part]
            row.append(counts[part] if part in counts else sum(blocks))  # a list is never called
        table[part] = [row[0], row[1] // 2, row[2]]
    return table


def count(args) -> None:
    size, classes = args.image_size, args.num_classes
    model = backbones.build_backbone(
        args.arch, in_chans=args.in_chans, image_size=size, stem=args.stem,
        patch_size=args.patch_size, positions="sincos", zero_init_residual=False, drop_path=0.0)
    image = torch.empty(1, args.in_chans, size, size, device="meta")  # counted, not computed
    table = count_parts(model.to("meta").eval(), image)
    whole, width = table.pop(""), model.num_features
    linear = [(width + 1) * classes, width * classes, classes]
    table |= {"backbone": whole, f"classifier of {classes}": linear,
              "both": [a + b for a, b in zip(whole, linear, strict=True)]}
    comm.print_main(f"{args.arch} on one image of {args.in_chans} x {size} x {size}, in millions")
    features.print_table(["part", "parameters", "multiply-adds", "activations"], [
        [part, *(f"{number / 1e6:,.3f}" for number in row)] for part, row in table.items()])


# ------------------------------------------------------------------------------------------ publish


def publish(args) -> None:
    """Write a backbone on the CPU; its name ends in the first 8 digits of the file's SHA-256."""
    source = features.resolve_checkpoint(args.run, "RUN", baselines=())
    loaded = weights.load_tensors(source.weights)
    for name, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            raise comm.RunError(f"{source.weights} is no backbone.pth: {name} is no tensor; "
                                "convert.py makes one of released weights")
    state = checkpoint.described(loaded, source.settings)
    for name, value in state.items():
        halved = args.half and value.is_floating_point()
        state[name] = value.half() if halved else value.clone()  # a part's storage is the whole's
        if not state[name].isfinite().all():
            why = ", being beyond 65504; leave out --half" if value.isfinite().all() else ""
            raise comm.RunError(f"{source.weights}: {name} is not finite{why}")
    content = io.BytesIO()
    torch.save(state, content)
    folder = args.run if os.path.isdir(args.run) else os.path.dirname(source.weights)
    name = args.name or os.path.basename(os.path.abspath(folder))
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    path = os.path.join(args.output, f"{name}-{digest[:8]}.pth")
    if os.path.exists(args.output) and not os.path.isdir(args.output):
        raise comm.RunError(f"--output {args.output} is a file; give a folder")
    with comm.same_error_on_all_ranks(writing=path), checkpoint.atomic_write(path) as file:
        file.write(content.getvalue())
    comm.print_main(f"{path}: {len(content.getvalue()):,} bytes, {len(state)} tensors"
                    f"{' in float16' if args.half else ''}, SHA-256 {digest}")


# ---------------------------------------------------------------------------------------------- env

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "scikit-learn", "faiss-cpu", "timm",
            "matplotlib", "tensorboard")
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE",
             "LOCAL_WORLD_SIZE", "SLURM_JOB_NUM_NODES")


def environment() -> dict[str, str]:
    """What a bug report needs to say of machine and versions."""
    def version(package):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{package} none"

    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    cards = collections.Counter(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "commit": checkpoint.git_commit() or "outside of a checkout",
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "packages": ", ".join(map(version, PACKAGES)),
        "CUDA": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
                f"NCCL {'.'.join(map(str, torch.cuda.nccl.version())) if gpus else None}",
        "GPUs": ", ".join(f"{number} x {card}" for card, number in cards.items()) or "none",
        "CPU": f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads of torch",
        "/dev/shm": f"{comm.free_bytes('/dev/shm') / 2**30:.1f} GiB free",
        "variables": ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES
                               if name in os.environ) or "none set",
    }


def env(args) -> None:
    found = environment()
    comm.print_main("\n".join(f"{name + ':':<11}{value}" for name, value in found.items()))


# ------------------------------------------------------------------------------------------ flatten

HERE = os.path.dirname(os.path.abspath(__file__))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NAMED = (*FUNCTIONS[:2], ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)
SCOPES = (*FUNCTIONS, *COMPREHENSIONS, ast.ClassDef)


def split_scope(node) -> tuple[list, list]:
    """What is evaluated outside of a function, class or comprehension, and what inside of it."""
    if isinstance(node, COMPREHENSIONS):
        first, *others = node.generators
        results = [getattr(node, name) for name in ("key", "value", "elt") if hasattr(node, name)]
        return [first.iter], [first.target, *first.ifs, *others, *results]
    inside = node.body if isinstance(node.body, list) else [node.body]
    if isinstance(node, ast.ClassDef):
        return [*node.decorator_list, *node.bases, *node.keywords], inside
    return [*getattr(node, "decorator_list", ()), node.args,
            *filter(None, [getattr(node, "returns", None)])], inside


def names_bound(nodes: list) -> set[str]:
    """Names that statements bind in the scope that they stand in."""
    bound, elsewhere = set(), set()
    nodes = list(nodes)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.Global):
            elsewhere |= {*node.names}
        elif isinstance(node, NAMED) and node.name:
            bound.add(node.name)
        if isinstance(node, SCOPES):
            outside, inside = split_scope(node)
            nodes += outside
            bound |= {part.target.id for whole in inside for part in ast.walk(whole)
                      if isinstance(part, ast.NamedExpr) and isinstance(node, COMPREHENSIONS)}
        else:
            nodes += ast.iter_child_nodes(node)
    return bound - elsewhere


def global_names(node, parent=None, local=frozenset(), of_class=frozenset()):
    """Yield (name's node, its parent, names that are local there) of all global names in a tree."""
    if isinstance(node, ast.Name) and node.id not in local | of_class:
        yield node, parent, local | of_class
    if not isinstance(node, SCOPES):
        for child in ast.iter_child_nodes(node):
            yield from global_names(child, node, local, of_class)
        return
    outside, inside = split_scope(node)
    for child in outside:
        yield from global_names(child, node, local, of_class)
    bound = names_bound(inside)
    if isinstance(node, FUNCTIONS):
        bound |= {part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)}
    for child in inside:
        yield from (global_names(child, node, local, bound) if isinstance(node, ast.ClassDef)
                    else global_names(child, node, local | bound))


@dataclass(eq=False)
class Piece:
    """A statement at the top of a module, with the comments above it."""

    module: str  # "" for the script
    node: ast.stmt
    text: str
    first_line: int  # of the text, in the module's file
    gap: int  # empty lines above it
    heading: str  # of its part of the module, "" if there is none
    names: set[str]  # that it defines
    uses: list = field(default_factory=list)  # (Piece, name there, node, names that are local here)


class Module:
    """The source of a module of `common/`, or of a script, in pieces."""

    def __init__(self, name: str, path: str):
        self.name, self.path, self.pieces = name, path, []
        try:
            with open(path, encoding="utf-8") as file:
                source = file.read()
            tree = ast.parse(source)
        except (OSError, SyntaxError) as error:
            reason = getattr(error, "strerror", None) or error
            raise comm.RunError(f"{path} cannot be read: {reason}") from error
        self.doc = ast.get_docstring(tree)
        self.doc_source = ast.get_source_segment(source, tree.body[0]) if self.doc else ""
        self.imports = collections.defaultdict(set)  # by name here: (module or None, name, alias)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.note_import(node, at_top=node in tree.body)

        lines, end, heading = source.splitlines(), 0, ""
        for node in tree.body:
            start, end, gap = end, node.end_lineno, 0
            if isinstance(node, ast.Import | ast.ImportFrom) or (self.doc and not start):
                continue
            while not lines[start] or lines[start].startswith("# ---"):
                gap, heading = (0, lines[start]) if lines[start] else (gap + 1, heading)
                start += 1
            self.pieces.append(Piece(name, node, "\n".join(lines[start:end]), start + 1, gap,
                                     heading, names_bound([node]) - {"_"}))
        self.defined = {name: piece for piece in self.pieces for name in piece.names}

    def note_import(self, node, at_top: bool) -> None:
        """Remember what an import binds; those inside of functions stay where they are."""
        source = getattr(node, "module", None)
        for alias in node.names:
            package = (source or alias.name).partition(".")[0]
            inside = package == "common" and (not at_top or not source)
            if inside or os.path.isfile(os.path.join(HERE, f"{package}.py")):
                raise comm.RunError(f"{self.path} line {node.lineno} imports {alias.name}; only "
                                    "`from common` at the top of a script can be flattened")
            if at_top:
                bound = alias.asname or alias.name.partition(".")[0]
                self.imports[bound].add((source, alias.name, alias.asname))

    def needs(self) -> list[str]:
        """The modules of `common/` that it imports from."""
        found = [name if source == "common" else source.removeprefix("common.")
                 for bound in self.imports.values() for source, name, _ in bound
                 if source and source.partition(".")[0] == "common"]
        return sorted(set(found))


class Flat:
    """A script and the pieces of `common/` that it uses."""

    def __init__(self, path: str):
        self.script, self.modules = Module("", path), {}
        self.load(self.script)
        self.modules[""] = self.script  # in an order in which they can be executed
        self.imports = collections.defaultdict(set)
        self.kept, waiting = [], list(self.script.pieces)
        while waiting:
            piece = waiting.pop()
            if piece not in self.kept:
                self.kept.append(piece)
                waiting += self.needed_by(piece)

    def load(self, module: Module) -> None:
        for name in module.needs():
            if name not in self.modules:
                other = Module(name, os.path.join(HERE, "common", f"{name}.py"))
                self.load(other)
                self.modules[name] = other

    def find(self, module: Module, name: str):
        """What a global name means: a Piece and its name there, a Module, or None: neither."""
        if name in module.defined:
            return module.defined[name], name
        for source, original, alias in module.imports.get(name, ()):
            if source == "common":
                return self.modules[original]
            if source and source.startswith("common."):
                return self.find(self.modules[source.removeprefix("common.")], original)
            self.imports[name].add((source, original, alias))
        return None

    def needed_by(self, piece: Piece) -> list[Piece]:
        """What a piece uses, and what acts on it, such as `name.register(...)` at top level."""
        module = self.modules[piece.module]
        for node, parent, local in global_names(piece.node):
            found = self.find(module, node.id)
            if isinstance(found, Module):
                member = parent.attr if isinstance(parent, ast.Attribute) else ""
                found, node = self.find(found, member), parent
                if found is None:
                    raise comm.RunError(f"{module.path} line {node.lineno}: `{ast.unparse(node)}` "
                                        "does not name a thing of common/, so it stays unknown")
            if found is not None:
                piece.uses.append((*found, node, local))
        needed = [used for used, *_ in piece.uses]
        for other in module.pieces if piece.module else ():
            first = next((node.id for node, *_ in global_names(other.node)), None)
            if not other.names and module.defined.get(first) is piece:
                needed.append(other)
        return needed

    def names(self) -> dict:
        """The name in the file of each (Piece, name): the same, or with the module's in front.

        Raises:
            RunError: a name would mean two things.
        """
        kept = [(piece, name) for piece in self.kept for name in sorted(piece.names)]
        often = collections.Counter(name for _, name in kept)
        hidden = {(piece, name) for user in self.kept for piece, name, _, local in user.uses
                  if name in local}
        taken = {*self.imports, *dir(builtins)}
        names = {(piece, name): f"{piece.module}_{name}" if piece.module and (
            often[name] > 1 or name in taken or (piece, name) in hidden) else name
            for piece, name in kept}
        origins = [name for name, found in self.imports.items() for _ in {
            (source, original) if source else alias and original for source, original, alias
            in found}]
        for name, times in collections.Counter([*names.values(), *origins]).items():
            if times > 1:
                raise comm.RunError(f"{self.script.path}: {name} would mean two things; rename one")
        return names

    def import_lines(self) -> str:
        """The imports of other packages, one a line: the standard library, then the rest."""
        blocks = {True: [], False: []}  # by whether it is of the standard library
        for source, name, alias in sorted({(source or "", name, alias or "") for bound in
                                           self.imports.values() for source, name, alias in bound}):
            line = f"from {source} import {name}" if source else f"import {name}"
            standard = (source or name).partition(".")[0] in sys.stdlib_module_names
            blocks[standard].append(f"{line} as {alias}" if alias else line)
        return "\n\n".join("\n".join(block) for block in blocks.values() if block)

    def text(self) -> str:
        names, title = self.names(), os.path.basename(self.script.path)
        with open(os.path.join(HERE, "LICENSE"), encoding="utf-8") as file:
            licence = file.read().rstrip("\n")
        commit = checkpoint.git_commit()
        about = [f"{title} and what it uses of common/, in one file; the method is at its end.",
                 f"Made by `python tools.py flatten {title}`{f' at {commit}' if commit else ''}.",
                 f"{' '.join(licence.split(chr(10))[0:3:2])}; the licence is below the code."]
        parts = [as_comment("\n".join(about)), self.script.doc_source, "", self.import_lines()]
        for module in self.modules.values():
            pieces = [piece for piece in module.pieces if piece in self.kept]
            if pieces:
                label = f"common/{module.name}.py" if module.name else title
                parts += ["", "", f"# {'=' * (97 - len(label))} {label}", ""]
                parts += [as_comment(module.doc)] if module.name and module.doc else []
            before = None
            for piece in pieces:
                wide = any(isinstance(each and each.node, (*FUNCTIONS, ast.ClassDef))
                           for each in (before, piece))
                parts += [""] * (2 if wide else 1 if before is None else piece.gap)
                if piece.heading and piece.heading != (before and before.heading):
                    parts += [*[""] * (0 if wide else 1), piece.heading, *[""] * piece.gap]
                parts.append(rewritten(piece, names, module.path))
                before = piece
        return "\n".join([*parts, "", "", as_comment(licence), ""])


def as_comment(text: str) -> str:
    return "\n".join(f"# {line}".rstrip() for line in text.split("\n"))


def rewritten(piece: Piece, names: dict, path: str) -> str:
    """The text of a piece with the names of the file; what stood below a bracket moves with it."""
    lines = piece.text.split("\n")
    edits = [(node.lineno, node.col_offset, node.end_col_offset, ast.unparse(node),
              names[used, name]) for used, name, node, _ in piece.uses]
    if isinstance(piece.node, (*FUNCTIONS, ast.ClassDef)) and piece.names:
        name, row = piece.node.name, piece.node.lineno
        column = re.match(r"(async )?\w+ +", lines[row - piece.first_line]).end()
        edits.append((row, column, column + len(name), name, names[piece, name]))
    moves = collections.defaultdict(list)  # by line: (column, how far what follows moves)
    for row, start, end, old, new in sorted(set(edits), reverse=True):
        row -= piece.first_line
        line = lines[row].encode()
        if line[start:end].decode() != old:  # older ones are wrong about places in f-strings
            raise comm.RunError(f"{path} line {row + piece.first_line}: {old} is not where Python "
                                f"{platform.python_version()} says; flatten with 3.11 or newer")
        lines[row] = (line[:start] + new.encode() + line[end:]).decode()
        moves[row].append((len(line[:start].decode()), len(new) - len(old)))

    spaces = [len(line) - len(line.lstrip()) for line in lines]
    indents, open_brackets, last = collections.Counter(), [], -1
    for token in tokenize.generate_tokens(io.StringIO(piece.text).readline):
        row, column = token.start[0] - 1, token.start[1]
        if row > last and open_brackets and token.type != tokenize.NL:
            # of the line that it is indented against: that of the innermost bracket, unless further
            # right, for it hangs below its own bracket
            above, place = next((each for each in reversed(open_brackets)
                                 if spaces[each[0]] <= column), open_brackets[0])
            indents[row] = indents[above]
            if column == place + 1:
                indents[row] += sum(move for at, move in moves[above] if at < place)
        last = max(last, token.end[0] - 1)
        if token.type == tokenize.OP and token.string in "([{":
            open_brackets.append((row, column))
        elif token.type == tokenize.OP and token.string in ")]}":
            open_brackets.pop()
    spaces = [len(line) - len(line.lstrip()) for line in lines]  # all that can be taken away
    return "\n".join(" " * max(0, indents[row]) + line[min(max(0, -indents[row]), spaces[row]):]
                     for row, line in enumerate(lines))


def flatten(args) -> None:
    if os.path.isdir(args.out):
        raise comm.RunError(f"{args.out} is a folder; name the file to write in it")
    if os.path.exists(args.out) and not args.overwrite:
        raise comm.RunError(f"{args.out} is there already; give another name or --overwrite")
    flat = Flat(args.script if args.script.endswith(".py") else f"{args.script}.py")
    text = flat.text()
    compile(text, args.out, "exec")
    out = args.out
    with comm.same_error_on_all_ranks(writing=out), checkpoint.atomic_write(out) as file:
        file.write(text.encode())
    used = [name for name in flat.modules if any(name == piece.module for piece in flat.kept)]
    comm.print_main(f"{args.out}: {len(text.splitlines())} lines; with parts of common/: "
                    f"{', '.join(filter(None, used))}")


# --------------------------------------------------------------------------------------------- main


def main(args):
    {"count": count, "publish": publish, "env": env, "flatten": flatten}[args.tool](args)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
