package main

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

func TestParsePort(t *testing.T) {
	for in, want := range map[string]node.Port{
		"80":                {Guest: 80},
		"8080:80":           {Host: 8080, Guest: 80},
		":80":               {Guest: 80},
		"0:80":              {Guest: 80},
		"8080:80/tcp":       {Host: 8080, Guest: 80},
		"127.0.0.1:8080:80": {HostIP: "127.0.0.1", Host: 8080, Guest: 80},
		"0.0.0.0::80":       {HostIP: "0.0.0.0", Guest: 80},
		"[::1]:8080:80":     {HostIP: "::1", Host: 8080, Guest: 80},
	} {
		if got, err := parsePort(in); err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", in, got, err, want)
		}
	}
	for _, in := range []string{"", "0", "65536", "x", "8080:", "8080:80/udp", "host:8080:80", "-1:80", "80:99999", "1:2:3:4"} {
		if got, err := parsePort(in); !sandbox.Is(err, sandbox.Invalid) || sandbox.HintOf(err) == "" {
			t.Errorf("%q: %+v, %v; want an error with a hint", in, got, err)
		}
	}
}

func TestParseVolume(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.Mkdir("data", 0o755); err != nil {
		t.Fatal(err)
	}
	here := filepath.Join(dir, "data")
	for in, want := range map[string]sandbox.Mount{
		here + ":/mnt":      {Source: here, Target: "/mnt"},
		"./data:/mnt:ro":    {Source: here, Target: "/mnt", ReadOnly: true},
		"./data:/mnt/x/:rw": {Source: here, Target: "/mnt/x"},
	} {
		got, volume, err := parseVolume(in)
		if err != nil || volume != nil || *got != want {
			t.Errorf("%q: %+v, %+v, %v", in, got, volume, err)
		}
	}
	if mount, volume, err := parseVolume("cache:/var/cache"); err != nil || mount != nil || *volume != (node.VolumeMount{Name: "cache", Path: "/var/cache"}) {
		t.Errorf("a volume: %+v, %+v, %v", mount, volume, err)
	}
	for _, in := range []string{"", "data", ":/mnt", "./data:mnt", "./data:/", "./data:/mnt:x", "./nosuch:/mnt", "cache:/c:ro", "a:b:c:d"} {
		if _, _, err := parseVolume(in); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%q: %v; want an error", in, err)
		}
	}
}

func TestEnvironmentFlagsAndFiles(t *testing.T) {
	t.Setenv("ATOLL_TEST_SET", "from outside")
	file := filepath.Join(t.TempDir(), "env")
	text := "# a comment\n\nA=1\r\n  B=two words=x\nATOLL_TEST_SET\nATOLL_TEST_UNSET\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{}
	if err := addEnvFile(env, file); err != nil {
		t.Fatal(err)
	}
	if err := addEnv(env, "A=over"); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"A": "over", "B": "two words=x", "ATOLL_TEST_SET": "from outside"}
	if !reflect.DeepEqual(env, want) {
		t.Errorf("got %v, want %v", env, want)
	}
	for _, bad := range []string{"", "=x", "a b=c"} {
		if err := addEnv(env, bad); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if err := os.WriteFile(file, []byte("A=1\nno good=1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := addEnvFile(env, file); err == nil || !strings.Contains(err.Error(), ":2") {
		t.Errorf("the error does not name the line: %v", err)
	}
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{
		"1": 1, "100b": 100, "1k": 1 << 10, "512m": 512 << 20, "512MB": 512 << 20, "2GiB": 2 << 30, "1.5g": 3 << 29, " 3 t ": 3 << 40,
	} {
		if got, err := parseSize(in); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "m", "-1m", "0", "1x", "nan", "inf", "1e400", "99999999t", "1 2m"} {
		if got, err := parseSize(in); err == nil {
			t.Errorf("%q: %d; want an error", in, got)
		}
	}
}

func TestParseTTL(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"90s": 90 * time.Second, "1h30m": 90 * time.Minute, "2d": 48 * time.Hour, "0": 0, "15": 15 * time.Second, "0.5d": 12 * time.Hour,
	} {
		if got, err := parseTTL(in); err != nil || got != want {
			t.Errorf("%q: %v, %v; want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"", "x", "-5s", "d", "5 parsecs", "-1d"} {
		if got, err := parseTTL(in); err == nil {
			t.Errorf("%q: %v; want an error", in, got)
		}
	}
}

func TestParseRules(t *testing.T) {
	for in, want := range map[string]rules{
		"age=30d":                  {MaxAge: 720 * time.Hour},
		"last=3, age=1h, size=50G": {KeepLast: 3, MaxAge: time.Hour, MaxBytes: 50 << 30},
	} {
		var got rules
		if err := got.Set(in); err != nil || got != want {
			t.Errorf("%q: %v, %v; want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"", "last=3", "age=-1d", "last=x,age=1h", "size=1 parsec", "keep=3", "age"} {
		var got rules
		if err := got.Set(in); err == nil {
			t.Errorf("%q: %v; want an error", in, got)
		}
	}
}

func TestParsePlace(t *testing.T) {
	for in, want := range map[string]place{
		"work:/tmp/x": {"work", "/tmp/x"},
		"work:":       {"work", "."},
		"work:a:b":    {"work", "a:b"},
		"./a:b":       {"", "./a:b"},
		"/a:b":        {"", "/a:b"},
		"dir/a:b":     {"", "dir/a:b"},
		"~/x":         {"", "~/x"},
		"-":           {"", "-"},
		"plain":       {"", "plain"},
	} {
		if got, err := parsePlace(in); err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", in, got, err, want)
		}
	}
	if _, err := parsePlace(""); err == nil {
		t.Error("an empty path is no error")
	}
}

func TestLanding(t *testing.T) {
	for _, c := range []struct {
		source, target    string
		sourceDir, isDir  bool
		wantDir, wantName string
	}{
		{"/a/f", "/t/g", false, false, "/t", "g"},
		{"/a/f", "/t", false, true, "/t", "f"},
		{"/a/f", "/t/", false, false, "/t/", "f"},
		{"/a/d", "/t", true, true, "/t", "d"},
		{"/a/d", "/t", true, false, "/", "t"},
		{"/a/d/.", "/t", true, true, "/t", ""},
		{"/a/d/.", "/t", true, false, "/t", ""},
		{"/", "/t", true, true, "/t", ""},
		{"f", "rel", false, false, ".", "rel"},
	} {
		dir, name := landing(c.source, c.target, c.sourceDir, c.isDir)
		if dir != c.wantDir || name != c.wantName {
			t.Errorf("landing(%q, %q): %q, %q; want %q, %q", c.source, c.target, dir, name, c.wantDir, c.wantName)
		}
	}
}

func TestNearNamesAreSuggested(t *testing.T) {
	if got := near("wrker", []string{"worker", "web", "wrkr"}); !reflect.DeepEqual(got, []string{"worker", "wrkr"}) {
		t.Errorf("got %v", got)
	}
	if got := near("ab", []string{"xy"}); got != nil {
		t.Errorf("two letters of two changed: %v", got)
	}
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"kitten", "sitting", 3}, {"abc", "abc", 0}, {"abc", "acb", 2}} {
		if got := distance(c.a, c.b); got != c.want {
			t.Errorf("distance(%q, %q) = %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

func FuzzParsers(f *testing.F) {
	for _, s := range []string{"127.0.0.1:8080:80/tcp", "a:/b:ro", "1.5g", "2d", "K=V", "work:/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := parsePort(s); err == nil && (p.Guest < 1 || p.Guest > 65535 || p.Host < 0 || p.Host > 65535) {
			t.Errorf("port %q: %+v", s, p)
		}
		if n, err := parseSize(s); err == nil && n < 0 {
			t.Errorf("size %q: %d", s, n)
		}
		if d, err := parseTTL(s); err == nil && d < 0 {
			t.Errorf("duration %q: %v", s, d)
		}
		if m, v, err := parseVolume(s); err == nil && (m == nil) == (v == nil) {
			t.Errorf("volume %q: %v, %v", s, m, v)
		}
		_, _ = parsePlace(s)
		_ = addEnv(map[string]string{}, s)
	})
}
