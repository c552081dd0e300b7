# ruff: noqa: E501 -- one case per line
"""Every kind of mistake: its code, its place, its words and its help.

Each case is a text in which «...» marks what the caret must underline, the code, a piece of the message and a piece of
the hint.
"""

import pytest

from attnlang import ir
from attnlang.grammar import CODES, AttnError, parse

P = "pattern p:\n    "

CASES = {
    # names
    "unknown": ("pattern p(window: int):\n    mask = q - k < «windw»", "ATL200", "`windw`", "did you mean `window`?"),
    "unknown nothing close": (P + "mask = «zzzzzz» < 3", "ATL200", "unknown name `zzzzzz`", ""),
    "python true": (P + "mask = «True»", "ATL200", "`True`", "write `true`"),
    "size case": (P + "mask = k < «lk»", "ATL200", "`lk`", "`Lk`"),
    "later": (P + "mask = «far»\n    let far = q > k", "ATL200", "before it is defined", "line 3"),
    "unknown function": (P + "mask = «expp»(q) > 0", "ATL200", "`expp`", "`exp`"),
    "unknown pattern": ("pattern causal: mask = k <= q\npattern p = «casual»", "ATL200", "`casual`", "`causal`"),
    "unknown module": (P + "mask = «lib».f(q)", "ATL200", "no imported file is called `lib`", ""),
    "unknown type": ("pattern p(x: «integer»): mask = x > q", "ATL200", "`integer`", "write `int`"),
    "lower-case size": ("pattern p(t: float[«n»]): score = s + t[h]", "ATL200", "`n`", "capital letter"),
    "call a tensor": ("pattern p(t: float[H]): score = «t»(h)", "ATL200", "`t`", "t[...]"),
    "part of a number": ("pattern p(x: int): mask = «x.y» < 3", "ATL200", "no part `y`", "q and k"),
    "function as value": (P + "mask = «exp» < 3", "ATL203", "is a function", "exp(...)"),
    "pattern as value": ("pattern a: mask = q < k\n" + P + "mask = «a» and q < 3", "ATL203", "is a pattern", "a(...)"),
    # duplicates
    "parameter twice": ("pattern p(x: int, «x»: float): mask = x > 3", "ATL201", "`x` is defined twice", "rename"),
    "let twice": (P + "let x = 1\n    let «x» = 2\n    mask = q < x", "ATL201", "`x` is defined twice", "rename"),
    "let hides parameter": ("pattern p(x: int):\n    let «x» = 2\n    mask = q < x", "ATL201", "twice", ""),
    "pattern twice": ("pattern p: mask = q < k\npattern «p»: mask = q < k", "ATL201", "twice", ""),
    "pattern and helper": ("def p(x: int) = x\npattern «p»: mask = q < k", "ATL201", "on line 1", ""),
    "mask twice": (P + "mask = q < k\n    «mask» = k < q", "ATL206", "the first is on line 2", "and"),
    "grid twice": (P + "grid q = (x: 3)\n    grid «q» = (x: 3)\n    mask = q.x < 2", "ATL201", "grid already", ""),
    "coordinate twice": (P + "grid q = (x: 3, «x»: 4)\n    mask = q < 2", "ATL201", "`x` is defined twice", ""),
    # names of the language
    "parameter q": ("pattern p(«q»: int): mask = q < k", "ATL202", "`q` is a name of the language", ""),
    "let s": (P + "let «s» = 3\n    mask = q < k", "ATL202", "`s`", ""),
    "let mask": (P + "let «mask» = q < k\n    mask = q < k", "ATL202", "`mask`", ""),
    "def exp": ("def «exp»(x: float) = x", "ATL202", "built-in function", ""),
    "keyword": ("pattern «if»: mask = q < k", "ATL104", "expected a name", "word of the language"),
    # types
    "int mask": (P + "mask = «q - k»", "ATL203", "a mask must be bool, got int", "compare"),
    "bool score": (P + "score = «q < k»", "ATL203", "a score must be float, got bool", "mask ="),
    "and of ints": (P + "mask = «q and k»", "ATL203", "`and` cannot be applied to int and int", "compare"),
    "not of int": (P + "mask = «not q»", "ATL203", "`not` cannot be applied to int", "compare"),
    "bits of float": (P + "mask = «1.5 & q» > 0", "ATL203", "`&` cannot be applied to float and int", "int(...)"),
    "shift of float": (P + "mask = «q << 1.5» > 0", "ATL203", "`<<`", "int(...)"),
    "int condition": (P + "mask = (q if «k» else 3) < 3", "ATL203", "must be bool, got int", "compare"),
    "float index": ("pattern p(t: float[Lk]): score = t[«s»]", "ATL203", "an index must be int", "int(...)"),
    "narrow argument": ("def f(x: int) = x\n" + P + "mask = f(«0.5») < 3", "ATL203", "must be int, got float", "int("),
    "narrow result": ("def f(x: float) -> int = «x»", "ATL203", "the result of `f` must be int, got float", "int("),
    "call a number": (P + "mask = («3»)(q) < 3", "ATL203", "can be called", ""),
    "builtin type": (P + "mask = «where(q, 1, 2)» < 3", "ATL203", "(int, int, int)", "where(c: bool, a, b)"),
    # arguments
    "too many for exp": (P + "mask = «exp(q, k)» > 0", "ATL204", "takes 1 argument, got 2", "exp(x: float)"),
    "too few for min": (P + "mask = «min(q)» > 0", "ATL204", "at least 2 arguments, got 1", ""),
    "named for exp": (P + "mask = exp(«x=q») > 0", "ATL204", "no named arguments", ""),
    "helper too many": ("def f(x: int) = x\n" + P + "mask = f(q, «k») > 0", "ATL204", "takes 1 argument, got 2", "x"),
    "helper too few": ("def f(x: int, y: int) = x\n" + P + "mask = «f(q)» > 0", "ATL204", "needs a value for `y`", ""),
    "helper wrong name": ("def f(xx: int) = xx\n" + P + "mask = f(«x»=q) > 0", "ATL204", "no parameter `x`", "`xx`"),
    "given twice": ("def f(x: int) = x\n" + P + "mask = f(q, «x=q») > 0", "ATL204", "is given twice", ""),
    "positional after named": ("def f(x: int, y: int) = x\n" + P + "mask = f(x=q, «k») > 0", "ATL204", "follow", ""),
    "static from runtime": (
        "pattern a(static n: int): mask = q < n\npattern p(m: int) = a(«m»)", "ATL204", "static", "declare",
    ),
    "size from tensor": (
        "pattern a(n: int):\n    grid q = (y: n, x: n)\n    mask = q.x < 2\npattern p(t: int[H]) = a(«t[h]»)",
        "ATL204", "sets a size", "",
    ),
    "score as argument": ("pattern a(n: float): mask = q < n\npattern p = a(«s»)", "ATL213", "not known", ""),
    # captured tensors
    "bare tensor": ("pattern p(t: float[H, Lq]): score = s + «t»", "ATL205", "without an index", "t[h, q]"),
    "rank": ("pattern p(t: float[H]): score = s + «t[h, q]»", "ATL205", "1 dimension(s), indexed with 2", "float[H]"),
    "index a number": ("pattern p(x: int): mask = «x»[3] < 3", "ATL205", "is a number", ""),
    "index an index": (P + "mask = «q»[3] < 3", "ATL205", "is a number", ""),
    "static tensor": ("pattern p(«static t: float[H]»): score = s", "ATL205", "cannot be static", "remove"),
    "tensor argument": ("def f(t: int[N]) = t[0]\n" + P + "mask = f(«q») < 3", "ATL205", "name of a captured", ""),
    "tensor rank": (
        "def f(t: int[N]) = t[0]\npattern p(u: int[H, Lk]): mask = f(«u») < 3", "ATL205", "1 dimension(s), but", "",
    ),
    "tensor type": ("def f(t: int[N]) = t[0]\npattern p(u: bool[H]): mask = f(«u») < 3", "ATL203", "holds bool", ""),
    "tensor shape": (
        "def f(t: int[Lk]) = t[0]\npattern p(u: int[Lq]): mask = f(«u») < 3", "ATL212", "is Lq, but `f` needs Lk", "",
    ),
    "size is two things": (
        "def f(t: int[N, N]) = t[0, 0]\npattern p(u: int[H, Lk]): mask = f(«u») < 3", "ATL212", "both H and Lk", "",
    ),
    "unbound size": ("pattern p(t: float[2 * «N»]): score = s + t[h]", "ATL212", "size `N` cannot be found", "`N: int`"),
    "float dimension": ("pattern p(t: float[«0.5»]): score = s + t[h]", "ATL212", "must be int, got float", ""),
    "negative dimension": ("pattern p(t: float[«-1»]): score = s + t[h]", "ATL212", "cannot be -1", ""),
    "index in a shape": ("pattern p(t: float[«q»]): score = s + t[h]", "ATL213", "not known in the shape", ""),
    "negative index": ("pattern p(t: float[H, Lk]): score = t[h, «-2»]", "ATL205", "-2 is negative", "`Lk - 2`"),
    # bodies
    "no body": ('pattern «p»:\n    """Nothing."""', "ATL206", "neither a mask nor a score", "mask ="),
    "only lets": ("pattern «p»:\n    let x = 3", "ATL206", "neither a mask nor a score", ""),
    "unknown statement": (P + "«maks» = q < k", "ATL206", "no statement `maks = ...`", "`mask`"),
    "assignment": (P + "let x = 1\n    «x» = 2\n    mask = q < x", "ATL206", "cannot be assigned again", "let"),
    "s in a mask": (P + "mask = «s» > 0", "ATL213", "the score `s` is not known in a mask", "before"),
    "s through let": (P + "let x = s * 2\n    mask = «x» > 0", "ATL213", "depends on the score", ""),
    "s in a helper": ("def f(x: float) = x * «s»", "ATL213", "not known in a helper", ""),
    "q in a helper": ("def f(x: int) = x + «q»", "ATL213", "not known in a helper", "argument"),
    "helper without return": ("def f(x: int):\n    let y = x«", "ATL103", "expected `let` or `return`", "return"),
    "return in a pattern": (P + "return «q < k»", "ATL218", "a pattern returns names", "only `def`"),
    "recursion": ("def f(x: int) = g(x)\ndef g(x: int) = «f»(x)", "ATL207", "f -> g -> f", "recursion"),
    "own pattern": ("pattern p = «p» & p", "ATL207", "p -> p", ""),
    "bad default": ("pattern p(x: int = «1.5»): mask = q < x", "ATL208", "is float, but the parameter is int", "float"),
    "default bool": ("pattern p(x: int = «true»): mask = q < x", "ATL208", "is bool, but", ""),
    "default reads a name": ("pattern p(x: int, y: int = «x»): mask = q < y", "ATL200", "`x`", ""),
    "default for a tensor": ("pattern p(t: float[H] = «0.0»): score = t[h]", "ATL208", "cannot have a default", ""),
    # grids
    "no grid": (P + "mask = «q.x» < 3", "ATL209", "`q` has no grid", "grid q ="),
    "no coordinate": (P + "grid q = (y: 3, x: 4)\n    mask = q.«z» < 3", "ATL209", "no coordinate `z`", "y, x"),
    "grid of h": (P + "grid «h» = (y: 3, x: 4)\n    mask = q < 3", "ATL209", "cannot have a grid", ""),
    "four coordinates": (P + "«grid q = (a: 2, c: 2, d: 2, e: 2)»\n    mask = q < 3", "ATL209", "at most 3", ""),
    "empty extent": (P + "grid q = (a: «0»)\n    mask = q < 3", "ATL209", "cannot be 0", ""),
    "float extent": (P + "grid q = (a: «2.5»)\n    mask = q < 3", "ATL209", "must be int", ""),
    # compositions
    "or of a score": (
        "pattern a: mask = q < k\npattern c: score = s * 2\npattern p = a | «c»", "ATL210", "`c` changes the score", "&",
    ),
    "not of a score": ("pattern c: score = s * 2\npattern p = ~«c»", "ATL210", "only mask", ""),
    "score as condition": ("pattern c: score = s * 2\n" + P + "mask = «c()» and q < k", "ATL210", "not a condition", ""),
    "and of patterns": ("pattern a: mask = q < k\npattern p = «a and a»", "ATL210", "not a pattern", "`&`"),
    "condition": ("pattern a: mask = q < k\npattern p = a & («q < 3»)", "ATL210", "not a pattern", "mask ="),
    "helper": ("def f(x: int) = x\npattern p = «f(3)»", "ATL210", "is a helper", ""),
    "types clash": (
        "pattern a(w: int): mask = q < w\npattern c(w: float): mask = q < w\npattern p = a & «c»",
        "ATL211", "`w` is int in `a`, but float in `c`", "c(w=...)",
    ),
    "defaults clash": (
        "pattern a(w: int = 1): mask = q < w\npattern c(w: int = 2): mask = q < w\npattern p = a & «c»",
        "ATL211", "default 1 in `a`, but 2 in `c`", "declare",
    ),
    "shapes clash": (
        "pattern a(w: int[H]): mask = q < w[h]\npattern c(w: int[Lk]): mask = q < w[k]\npattern p = a & «c»",
        "ATL211", "int[H] in `a`, but int[Lk] in `c`", "",
    ),
    "size and parameter": (
        "pattern a(w: int[N]): mask = q < w[h]\npattern c(N: int): mask = q < N\npattern p = a & «c»",
        "ATL211", "`N` is a parameter and a size", "",
    ),
    # numbers
    "large int": (P + "mask = q < «99999999999999999999»", "ATL107", "larger than", ""),
    "huge int": (P + f"mask = q < «{'9' * 9999}»", "ATL107", "larger than", ""),
    "large float": (P + "mask = q < «1e999»", "ATL107", "too large", "inf"),
    "large power": (P + "mask = q ** «100» < 3", "ATL107", "at most 64", "float"),
    "no digits": (P + "mask = q < «0x_»", "ATL101", "no digits", ""),
    # layout
    "no colon": ("pattern p(x: int)«\n    mask = q < x", "ATL104", "unexpected end of the line", "end the line with `:`"),
    "no indent": ("pattern p:\n«mask» = q < k", "ATL103", "expected an indented block", ""),
    "indented start": ("«    »pattern p: mask = q < k", "ATL103", "first definition is indented", ""),
    "indented start later": ("\n\n«    »pattern p: mask = q < k", "ATL103", "first definition is indented", ""),
    "tabs and spaces": (P + "mask = q < k\n«\t»score = s", "ATL103", "mixes tabs and spaces", "spaces"),
    "dedent to nowhere": ("pattern p:\n      mask = q < k\n«   »score = s", "ATL103", "matches no block", "0, 6"),
    "deeper": (P + "mask = q < k\n«      »score = s", "ATL103", "unexpected indentation", ""),
    "never closed": (P + "mask = «(»q < k", "ATL105", "`(` is never closed", "`)`"),
    "never closed before pattern": (P + "mask = min«(»q, k\npattern a: mask = q < k", "ATL105", "never closed", ""),
    "never closed before score": (P + "mask = (q < k\n    «score» = s", "ATL104", "`score`", "line 2 may be missing"),
    "closes nothing": (P + "mask = q < k«)»", "ATL105", "closes nothing", ""),
    "wrong bracket": (P + "mask = (q < k«]»", "ATL105", "`]` where `)` was expected", ""),
    "string": ('pattern p:\n    «"""Doc\n    mask = q < k', "ATL102", "does not end", "quotes"),
    "import string": ('import «"x.attn as x', "ATL102", "does not end", ""),
    # signs and words
    "single equals": (P + "mask = q «=» k", "ATL104", "unexpected `=`", "`==`"),
    "double ampersand": (P + "mask = q < k &«&» q > 3", "ATL104", "unexpected `&`", "write `and`"),
    "exclamation": (P + "mask = «!»(q < k)", "ATL101", "`!`", "write `not`"),
    "semicolon": (P + "mask = q < k«;» score = s", "ATL101", "`;`", "own line"),
    "odd character": (P + "mask = q «≤» k", "ATL101", "`≤`", ""),
    "control character": (P + "mask = q «\x1b» k", "ATL101", "U+001B", ""),
    "backslash": (P + "mask = q < «\\»\n  k", "ATL101", "", "parentheses"),
    "loop": (P + "«for» x in q:\n        mask = q < k", "ATL104", "`for`", "no loops"),
    "missing operand": (P + "mask = not«", "ATL104", "expected an expression", ""),
    "missing else": (P + "mask = q < k if q > 3«", "ATL104", "expected `else`", ""),
    "untyped parameter": ("pattern p(x«)»: mask = q < x", "ATL104", "expected `:`", "`name: type`"),
    "misspelt pattern": ("«patern» p: mask = q < k", "ATL104", "`patern`", "`pattern`"),
    "end of file": ("pattern p(x: int) =«", "ATL104", "end of the line; expected an expression", ""),
    # normalisers
    "no normaliser": (P + "normalize = «s»", "ATL214", "not a normaliser", "softmax"),
    "misspelt normaliser": (P + "normalize = «softmx(sink=1.0)»", "ATL214", "not a normaliser", "`softmax`"),
    "sink argument": (P + "normalize = softmax(«snk»=1.0)", "ATL204", "no argument `snk`", "`sink`"),
    "positional sink": (P + "normalize = softmax(«1.0»)", "ATL204", "0 arguments without a name", "sink=..."),
    "sink of a key": (P + "normalize = softmax(sink=1.0 * «k»)", "ATL213", "`k` is not known in a sink", ""),
    "elementwise of nothing": (P + "normalize = «elementwise()»", "ATL204", "needs its argument `value`", ""),
    "bool values": (P + "normalize = elementwise(«s > 0»)", "ATL203", "must be float, got bool", "float("),
    "divisor of a key": (P + "normalize = elementwise(s, divisor=1.0 * «k»)", "ATL213", "not known in a divisor", ""),
    "normaliser without weight": (P + "«normalize»:\n        stat m = max(s)", "ATL214", "has no weight", "weight ="),
    "weight twice": (
        P + "normalize:\n        weight = s\n        «weight» = s", "ATL206", "`weight` is given twice", "",
    ),
    "normaliser twice": (P + "normalize = softmax\n    «normalize» = softmax", "ATL206", "given twice", ""),
    "normaliser with a name": (P + "normalize «mine»:\n        weight = s", "ATL214", "has no name", "`normalize:`"),
    "hook of a normaliser": (P + "normalize:\n        «wieght» = s", "ATL214", "no statement `wieght", "`weight`"),
    "grid in a normaliser": (
        P + "normalize:\n        «grid q = (x: 3)»\n        weight = s", "ATL214", "no place", "`stat name",
    ),
    "statistic of nothing": (P + "normalize:\n        stat m = «s»\n        weight = s", "ATL214", "max, min", ""),
    "misspelt statistic": (
        P + "normalize:\n        stat m = «maxx(s)»\n        weight = s", "ATL214", "a statistic is", "`max`",
    ),
    "statistic twice": (
        P + "normalize:\n        stat m = max(s)\n        stat «m» = max(s)\n        weight = s", "ATL201", "twice", "",
    ),
    "statistic called w": (P + "normalize:\n        stat «w» = max(s)\n        weight = s", "ATL202", "`w`", ""),
    "statistic with a shape": (
        P + "normalize:\n        «stat m[H] = max(s)»\n        weight = s", "ATL214", "no dimensions", "",
    ),
    "root without a seed": (
        P + "normalize:\n        stat t = «root(max(s - t, 0))»\n        weight = s", "ATL214", "needs a seed", "seed=",
    ),
    "seed of a pair": (
        P + "normalize:\n        stat m = max(s, seed=«s»)\n        weight = s", "ATL213", "not known in the seed", "",
    ),
    "later statistic": (
        P + "normalize:\n        stat l = sum(«m»)\n        stat m = max(s)\n        weight = s", "ATL200", "`m`", "",
    ),
    "statistic by something": (
        P + "normalize:\n        stat m = max(s, by=«h»)\n        weight = s", "ATL214", "by=group", "",
    ),
    "statistic by no group": (
        P + "normalize:\n        stat m = max(s, by=«group»)\n        weight = s", "ATL214", "no groups", "groups =",
    ),
    "statistic outside": (P + "«stat» m = max(s)", "ATL214", "`normalize:` block", ""),
    "w in a score": (P + "score = «w»", "ATL213", "the weight `w` is not known in a score", "after normalisation"),
    "w in a mask": (P + "mask = «w» > 0", "ATL213", "the weight `w` is not known in a mask", "before"),
    "bool weights": (P + "weights = «w > 0»", "ATL203", "must be float, got bool", ""),
    "parameter w": ("pattern p(w: float): weights = «w»", "ATL202", "a name of this pattern", "another name"),
    "weights twice": (P + "weights = w\n    «weights» = w", "ATL206", "the first is on line 2", ""),
    "late normaliser": (P + "weights = w\n    «normalize = softmax»", "ATL214", "behind `weights`", "move it up"),
    "later normaliser": (
        P + "output a = sum(w, over=q)\n    «normalize = softmax»", "ATL214", "behind an output", "move it up",
    ),
    # outputs
    "output of nothing": (P + "output a = «sum(w)»", "ATL215", "over what", "over=k"),
    "output over h": (P + "output a = sum(w, over=«h»)", "ATL215", "over q, over k", ""),
    "output argument": (P + "output a = sum(w, «ovr»=k)", "ATL204", "no argument `ovr`", "`over`"),
    "output with a shape": (P + "«output a[H] = sum(w, over=k)»", "ATL215", "the shape of an output", ""),
    "output twice": (P + "output a = sum(w, over=k)\n    output «a» = sum(w, over=q)", "ATL201", "twice", ""),
    "output called as a parameter": ("pattern p(a: int):\n    output «a» = sum(w, over=k)", "ATL201", "twice", ""),
    "argmax over q": (P + "output a = «argmax(w, over=q)»", "ATL215", "over k", ""),
    "maximum of rows": (P + "output a = max(«w * V», over=k)", "ATL215", "rows are summed", ""),
    "key without extent": (P + "output a = sum(w, over=k, key=«k»)", "ATL215", "1 key(s) and 0 extent(s)", ""),
    "float key": (P + "output a = sum(w, over=k, key=«0.5», extent=3)", "ATL203", "a key must be int", ""),
    "extent of nothing": (P + "output a = sum(w, over=k, key=k, extent=«0»)", "ATL215", "cannot be 0", ""),
    "extent of a key": (P + "output a = sum(w, over=k, key=k, extent=«k»)", "ATL213", "not known in the extent", ""),
    "empty of a row": (P + "output a = max(s, over=k, empty=«H»)", "ATL203", "must be a constant", "-inf"),
    "bool output": (P + "output a = sum(«w > 0», over=k)", "ATL203", "must be float, got bool", "float("),
    "branch of an output": (P + "output a = sum(w, over=k, branch=«near»)", "ATL217", "not a branch", "there is none"),
    "sum in an expression": (P + "score = «sum»(s)", "ATL200", "`sum`", "output name = sum"),
    "softmax in an expression": (P + "score = «softmax»(s)", "ATL200", "`softmax`", "normalize = softmax"),
    "a list in an expression": (P + "mask = «(q, k)» == 3", "ATL203", "a list of values", ""),
    "unknown kind": (P + "«outptu» a = sum(w, over=k)", "ATL206", "no statement `outptu name", "`output`"),
    "unknown block": (P + "«normalise»:\n        weight = s", "ATL206", "no block `normalise:`", "`normalize`"),
    "outputs": (P + "outputs lse«,» o", "ATL104", "`,`", "output name = sum"),
    "dropout in a helper": ("def f(x: float) = «dropout(x, 0.5, 3)»", "ATL213", "b, h, q and k", "random(seed"),
    # score terms, rows and addresses
    "term of nothing": (P + "term t = «s * 2»", "ATL216", "sum over the features", "dot("),
    "term called w": (P + "term «w» = dot(Q, K)", "ATL202", "`w`", ""),
    "term called as a statistic": (P + "term «m» = dot(Q, K)", "ATL202", "a statistic", ""),
    "term twice": (P + "term t = dot(Q, K)\n    term «t» = dot(Q, K)", "ATL201", "twice", ""),
    "term with a shape": (P + "«term t[H] = dot(Q, K)»", "ATL216", "no dimensions", ""),
    "term and statistic": (
        P + "term t = dot(Q, K)\n    «normalize = sparsemax()»", "ATL201", "a score term and a statistic", "rename",
    ),
    "one row": (P + "term t = «dot(Q)»", "ATL204", "needs its argument `right`", "dot(left, right)"),
    "no rows": (P + "term t = dot(Q, «3»)", "ATL216", "does not stand for rows", "`Q`"),
    "unknown rows": (P + "term t = dot(Q, «rell»)", "ATL200", "`rell`", ""),
    "bare table": (
        "pattern p(t: float[H, N, 8]):\n    term u = dot(Q, «t»)", "ATL216", "does not say which row", "t[h, k]",
    ),
    "all indices": (
        "pattern p(t: float[N, 8]):\n    term u = dot(Q, «t[k, 3]»)", "ATL216", "a row has 1 indices", "got 2",
    ),
    "rows of ints": ("pattern p(t: int[N, 8]):\n    term u = dot(Q, «t[k]»)", "ATL216", "must be float", ""),
    "rows of v": ("pattern p(v: float[N, 8]):\n    term u = dot(Q, «v[k]»)", "ATL202", "cannot be told", "another"),
    "two indices of K": (P + "keys = «K[b, k]»", "ATL216", "found by 3 indices, got 2", "K[b, h, k]"),
    "key of a query": (P + "keys = K[b, h, «q»]", "ATL216", "cannot depend on q", ""),
    "head of a pair": (P + "term t = dot(Q, K[b, «h + q», k])", "ATL216", "only the last index", ""),
    "float address": (P + "keys = K[b, h, «0.5»]", "ATL203", "must be int", "int("),
    "negative address": (P + "keys = K[b, h, «-1»]", "ATL205", "-1 is negative", ""),
    "score in an address": (P + "keys = K[b, h, int(«s»)]", "ATL213", "not known in an address", ""),
    "element in a score": (P + "score = s + «Q[b, h, q, 0]»", "ATL213", "not known in a score", "`rows`"),
    "rows in a score": (P + "score = s + «V»", "ATL200", "`V`", "stands for rows"),
    "y outside": (P + "term t = sum_d(x * «z», Q, K)", "ATL200", "`z`", ""),
    "one length": (P + "lengths = «Lq»", "ATL216", "are two", "(Lq,"),
    "position of b": (P + "position «b» = b", "ATL216", "has no position", ""),
    "position of a pair": (P + "position q = q + «k»", "ATL213", "not known in a position", ""),
    "keys twice": (P + "keys = K\n    «keys» = K", "ATL206", "given twice", ""),
    "late values": (P + "output a = sum(w * V, over=k)\n    «values» = none", "ATL216", "behind an output", "up"),
    # branches and groups
    "branch without a name": (P + "«branch»:\n        mask = q < k", "ATL217", "needs a name", "near"),
    "branch twice": (
        P + "branch a: mask = q < k\n    branch «a»: mask = k < q\n    output x = sum(w, over=k, branch=a)",
        "ATL201", "twice", "",
    ),
    "output of which branch": (
        P + "branch a: mask = q < k\n    «output x = sum(w, over=k)»", "ATL217", "several branches", "branch=a",
    ),
    "misspelt branch": (
        P + "branch near: mask = q < k\n    output x = sum(w, over=k, branch=«naer»)", "ATL217", "not a branch", "`near`",
    ),
    "branches without outputs": ("pattern «p»:\n    branch a: mask = q < k", "ATL215", "no output", "branch="),
    "hook behind branches": (
        P + "branch a: mask = q < k\n    «score» = s * 2\n    output x = sum(w, over=k, branch=a)",
        "ATL217", "behind the branches", "move it up",
    ),
    "keys of a branch": (P + "branch a: «keys» = K", "ATL217", "for all branches", "outside"),
    "term of a branch": (P + "branch a: «term» t = dot(Q, K)", "ATL206", "no place in a branch", ""),
    "group alone": (P + "«group» = q // 3", "ATL217", "needs `groups = ...`", "how many"),
    "groups of a key": (P + "group = k\n    groups = «k»", "ATL213", "not known in the number of groups", ""),
    "float group": (P + "group = «0.5»\n    groups = 3", "ATL203", "a group must be int", "int("),
    # stages
    "pool of nothing": (P + "pool a = mean(«s», block=3)", "ATL218", "no rows to pool", "`Q`"),
    "pool by what": (P + "pool a = «avg(K, block=3)»", "ATL218", "not pooled", "mean"),
    "pool without block": (P + "pool a = «mean(K)»", "ATL204", "needs its argument `block`", "block=64"),
    "empty block": (P + "pool a = mean(K, block=«0»)", "ATL218", "at least one row", ""),
    "select by what": (P + "select a[Lq, Lk] = «best(1.0, 3)»", "ATL218", "not selected", "top("),
    "select without shape": (P + "«select a = top(1.0, 3)»", "ATL218", "needs its shape", "[Lq,"),
    "select none": (P + "select a[Lq, Lk] = top(1.0, «0»)", "ATL218", "is none", ""),
    "select by a key": (P + "select a[Lq, Lk] = top(1.0, «k»)", "ATL213", "not known in `count`", ""),
    "int candidates": (P + "select a[Lq, Lk] = top(1.0, 3, candidates=«k»)", "ATL203", "must be bool", "compare"),
    "rows without shape": (P + "«rows a = 1.0»", "ATL218", "needs its shape", ""),
    "key in rows": (P + "rows a[Lq, D] = 1.0 * «k»", "ATL213", "not known in `rows`", ""),
    "reduction in a score": (P + "score = «sum_d»(s)", "ATL200", "`sum_d`", "features"),
    "attend without a name": (P + "«attend»:\n        mask = q < k", "ATL218", "needs a name", "attend gate:"),
    "stage in a stage": (P + "attend a:\n        «pool» x = mean(K, block=3)", "ATL206", "no place", ""),
    "stage twice": (P + "attend a: mask = q < k\n    attend «a»: mask = q < k", "ATL201", "twice", "rename"),
    "after the end": (
        P + "mask = q < k\n    rows x[Lq, D] = o[b, h, q, d]\n    «score = s»", "ATL218", "ended on line 3", "attend name:",
    ),
    "return of nothing": (P + "mask = q < k\n    return «oo»", "ATL218", "no stage makes `oo`", ""),
    "return twice": (P + "attend a: mask = q < k\n    return a, «a»", "ATL201", "returned twice", ""),
    "wrong rank of a stage": (
        P + "attend a: mask = q < k\n    rows x[Lq, D] = «a[b, h, q]»", "ATL205", "4 dimension(s), indexed with 3", "",
    ),
    # compositions of more than masks and scores
    "two normalisers": (
        "pattern a: normalize = sparsemax()\npattern b: weights = w * 2\npattern p = «a & b»", "ATL210", "both", "one",
    ),
    "or with a normaliser": (
        "pattern a: normalize = sparsemax()\npattern b: mask = k < q\npattern p = «a» | b", "ATL210", "more than", "&",
    ),
    "condition with a normaliser": (
        "pattern a: normalize = sparsemax()\n" + P + "mask = «a()»", "ATL210", "is more than a mask", "compose",
    ),
    "bare condition": (P + "q «<» k", "ATL104", "expected `=`", "mask = ..."),
    "statement outside": ("«mask» = q < k", "ATL104", "`mask`", "body of a `pattern`"),
    "choice as a statement": (P + "«if» q < k:\n        mask = true", "ATL104", "`if`", "is an expression"),
    "lambda": (P + "mask = lambda «x»: x", "ATL104", "`x`", "def f"),
    "string in an expression": (P + "mask = «'x'»", "ATL104", "unexpected string", "no strings"),
    "coordinate without extent": (P + "grid q = (y«)»\n    mask = q < k", "ATL104", "expected `:`", "name: extent"),
    # imports
    "import as an index": ('import "x.attn" as «q»', "ATL202", "is an index", ""),
    "import of another kind": ('import «"x.py"» as x', "ATL300", "must end in .attn", '"x.py.attn"'),
    "import above": ('import «"../x.attn"» as x', "ATL300", "not allowed", "no `..`"),
    "import without as": ('import "x.attn"«', "ATL104", "expected `as`", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_mistake(name):
    marked, code, message, hint = CASES[name]
    text = marked.replace("«", "").replace("»", "")
    before = marked[: marked.index("«")]
    line = before.count("\n") + 1
    column = len(before) - (before.rfind("\n") + 1) + 1
    with pytest.raises(AttnError) as caught:
        parse(text, filename="t.attn")
    error = caught.value
    assert (error.code, error.line, error.column) == (code, line, column), str(error)
    assert message in error.message and hint in error.hint, str(error)
    assert len(error.diagnostics) == 1, str(error)
    assert code in CODES
    if "»" in marked:
        underlined = marked[marked.index("«") + 1 : marked.index("»")]
        assert error.end_column - error.column == len(underlined), str(error)


def test_every_code_is_tested():
    elsewhere = {"ATL100", "ATL106", "ATL301", "ATL302", "ATL303"}  # limits and imports have files of their own
    assert {case[1] for case in CASES.values()} | elsewhere == set(CODES)


def test_rendering():
    with pytest.raises(AttnError) as caught:
        parse("pattern p(window: int):\n    mask = q - k < windw\n", filename="band.attn")
    assert str(caught.value) == (
        "band.attn:2:20: error[ATL200]: unknown name `windw`\n"
        "   2 |     mask = q - k < windw\n"
        "     |                    ^^^^^\n"
        "help: did you mean `window`?"
    )
    assert isinstance(caught.value, ir.ProgramError) and caught.value.source_line == "    mask = q - k < windw"


def test_independent_mistakes_come_together_and_their_consequences_do_not():
    with pytest.raises(AttnError) as caught:
        parse(
            "def f(x: int) = x + y\n"
            "pattern a(w: integer):\n    let d = z\n    mask = d < f(q) + w\n    score = u\n"
            "pattern c = a & nothing\n"
        )
    assert [(d.line, d.code) for d in caught.value.diagnostics] == [
        (1, "ATL200"), (2, "ATL200"), (3, "ATL200"), (5, "ATL200"),
    ]  # fmt: skip


def test_long_reports_and_long_lines_are_cut():
    text = "".join(f"pattern p{i}: mask = q < x{i}\n" for i in range(50))
    with pytest.raises(AttnError) as caught:
        parse(text)
    assert len(caught.value.diagnostics) == 50 and str(caught.value).endswith("... and 30 more errors")
    with pytest.raises(AttnError) as caught:
        parse("pattern p: mask = " + "q + " * 5000 + "wrong < 3" + " + q" * 5000)
    _, quote, caret, *_ = str(caught.value).split("\n")
    assert len(quote) < 140 and quote[caret.index("^") :].startswith("wrong <")


def test_terminal_escapes_are_not_echoed():
    with pytest.raises(AttnError) as caught:
        parse('pattern p: mask = q < "\x1b[2J\u202e" + windw')
    assert "\x1b" not in str(caught.value) and "\u202e" not in str(caught.value)
