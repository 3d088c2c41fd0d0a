package image

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

// conformance: FR3.5
func TestDockerfileErrorsNameTheLine(t *testing.T) {
	for text, want := range map[string]string{
		"RUN x":                            "line 1: parse: RUN stands before the first FROM",
		"# nothing":                        "no FROM",
		"FROM a\n\nFETCH x":                "line 3: parse: unknown instruction \"FETCH\"",
		"FROM a\nONBUILD RUN x":            "line 2: parse: ONBUILD is not supported",
		"FROM a\nRUN --mount=type=cache x": "line 2: parse: RUN --mount=type=cache is not supported",
		"FROM --platform=x a":              "line 1: parse: FROM --platform is not supported",
		"FROM a AS b\nFROM a AS B":         "line 2: parse: there are two stages",
		"FROM a b":                         "line 1: parse: FROM wants",
		"FROM a\nADD https://x/y /":        "line 2: parse: ADD of a URL",
		"FROM a\nCOPY a":                   "line 2: parse: COPY wants",
		"FROM a\nCOPY --chmod=u+x a b":     "line 2: parse: --chmod=u+x",
		"FROM a\nCOPY --parents a b":       "line 2: parse: COPY --parents",
		"FROM a\nCOPY <<X /y\nz\nX":        "line 2: parse: COPY of a here-document",
		"FROM a\nRUN <<X\nnever ends":      "line 2: the here-document has no line \"X\"",
		"FROM a\nENV A":                    "line 2: parse: ENV wants KEY=value",
		"FROM a\nENV A=1 B":                "line 2: parse: ENV: \"B\"",
		"FROM a\nWORKDIR a b":              "line 2: parse: WORKDIR wants 1 argument",
		"FROM a\nSHELL sh":                 "line 2: parse: SHELL wants",
		"FROM a\nENV A='x":                 "line 2: parse: a quote",
		"# escape=x\nFROM a":               "line 1: the escape character",
		"FROM a\nRUN " + strings.Repeat("x", maxInstruction+1): "line 2",
		strings.Repeat("#", maxDockerfile+1):                   "larger than",
	} {
		_, err := ParseDockerfile(strings.NewReader(text))
		if kind := sandbox.KindOf(err); err == nil || !strings.Contains(err.Error(), want) || kind != sandbox.Invalid && kind != sandbox.Unsupported {
			t.Errorf("%.60q: %v, kind %s", text, err, kind)
		}
	}
}

func TestDockerfileFormsAreRead(t *testing.T) {
	recipe, err := ParseDockerfile(strings.NewReader("\ufeff# escape=`\r\nfrom a\r\n" +
		"run a `\r\n  # comment\r\n\r\n  b\n" +
		"RUN python3 <<X\nprint()\nX\n" +
		"RUN <<-\"X\"\n\tone\n\ttwo\n\tX\n" +
		"CMD a b\nCMD [\"a\", \"b\"]\nENV A b c\nENV A=b\\ c D='e f'\nVOLUME /x\nHEALTHCHECK NONE\nARG X\nEXPOSE 1-2/udp\nRUN tail"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range recipe.Stages[0].Steps {
		got = append(got, fmt.Sprintf("%d %s %q %v", s.Line, s.Op, s.Args, s.Exec))
	}
	want := []string{
		`3 run ["a   b"] false`, `7 run ["python3 <<X\nprint()\nX\n"] false`, `10 run ["one\ntwo\n"] false`, `14 cmd ["a b"] false`,
		`15 cmd ["a" "b"] true`, `16 env ["A=b c"] false`, `17 env ["A=b\\ c" "D='e f'"] false`, `20 arg ["X"] false`, `21 expose ["1-2/udp"] false`, `22 run ["tail"] false`,
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestWordsExpandAsInDockerfiles(t *testing.T) {
	env := []string{"A=1", "E=", "S=x y"}
	lookup := func(name string) (string, bool) { return getEnv(env, name) }
	for word, want := range map[string]string{
		"$A": "1", "${A}b": "1b", "$Ab": "", "$S": "x y", `"$A"`: "1", `'$A'`: "$A", `\$A`: "$A", `a\ b`: "a b", `"a\"b\n"`: `a"b\n`,
		"${N:-d}": "d", "${E:-d}": "d", "${A:-d}": "1", "${A:+d}": "d", "${N:+d}": "", "${N:-${A}x}": "1x", "${N:-\"}\"}": "}", "$": "$", "a$": "a$", "$$": "$$", "": "",
	} {
		if got, err := expandWord(word, lookup); err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", word, got, err, want)
		}
	}
	for _, word := range []string{"${", "${A", "${A:-b", "${}", "${A#x}", "${N:-" + strings.Repeat("${N:-", 20)} {
		if got, err := expandWord(word, lookup); err == nil {
			t.Errorf("%s: %q", word, got)
		}
	}
}

func TestSourcesOfTheReleaseAreTakenForAnySuite(t *testing.T) {
	targets := "http://m/debian bookworm main\nhttp://m/debian bookworm main\nhttp://m/debian bookworm-updates main\nhttp://m/sec bookworm-security main\n" +
		"http://m/debian bookworm-backports main\nhttps://vendor/apt nodistro main\nshort line\n"
	want := "deb http://m/debian trixie main\ndeb http://m/debian trixie-updates main\ndeb http://m/sec trixie-security main"
	if got := sourceLines(targets, "bookworm", "trixie"); got != want {
		t.Errorf("got\n%s", got)
	}
}

func TestOnlyDebianAndUbuntuHaveRecipes(t *testing.T) {
	if d, err := parseRelease("NAME=\"Ubuntu\"\nVERSION_CODENAME=noble\nID=ubuntu\n"); err != nil || d != (distribution{"ubuntu", "noble"}) {
		t.Errorf("%v, %v", d, err)
	}
	if _, err := parseRelease("ID=fedora\nVERSION_ID=42\n"); err == nil || !strings.Contains(err.Error(), "fedora") {
		t.Errorf("%v", err)
	}
}

// conformance: FR2.2
func TestMissingToolsAndMirrorsAreExplained(t *testing.T) {
	s := openStore(t)
	if _, err := hostDistribution(); err != nil {
		t.Skip(err)
	}
	for _, name := range []string{"--hook", "a,b", "A", "", "a b", "$(x)"} {
		if _, err := s.BuildDebian(t.Context(), DebianOptions{Packages: []string{name}}); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("package %q: %v", name, err)
		}
	}
	path := os.Getenv("PATH")
	t.Setenv("PATH", t.TempDir())
	if _, err := s.BuildDebian(t.Context(), DebianOptions{}); !sandbox.Is(err, sandbox.Unsupported) || !strings.Contains(err.Error(), "apt-get install mmdebstrap") {
		t.Errorf("without mmdebstrap: %v", err)
	}
	t.Setenv("PATH", path)
	for line, kind := range map[string]sandbox.Kind{
		"E: Unable to locate package nonsense":                                                    sandbox.NotFound,
		"Err:1 http://m bookworm InRelease\nE: Failed to fetch http://m/x  Could not resolve 'm'": sandbox.Unavailable,
		"E: The repository 'http://m nonsense Release' does not have a Release file.":             sandbox.NotFound,
		"tar: write error: No space left on device":                                               sandbox.Exhausted,
		"E: something else": sandbox.Internal,
	} {
		log := &mmdebstrapLog{report: func(string) {}}
		fmt.Fprintln(log, line)
		if err := log.explain(fmt.Errorf("exit status 1")); !sandbox.Is(err, kind) {
			t.Errorf("%s: %v", line, err)
		}
	}
	nothingLeft(t, s)
}
