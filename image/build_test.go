package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/layer"
	"github.com/atoll-run/atoll/sandbox"
)

// chroot is a Machine of an overlay and chroot. It needs root.
type chroot struct {
	dir string
}

// startChroot mounts an image's root and lets commands run in it.
func startChroot(t *testing.T) func(context.Context, Image) (Machine, error) {
	if os.Getuid() != 0 {
		t.Skip("chroot needs root")
	}
	return func(_ context.Context, i Image) (Machine, error) {
		c := &chroot{dir: t.TempDir()}
		for _, d := range []string{"lower", "upper", "work", "root"} {
			if err := os.Mkdir(filepath.Join(c.dir, d), 0o755); err != nil {
				return nil, err
			}
		}
		if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", i.Root.Path, c.at("lower")).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%w: %s", err, out)
		}
		opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", c.at("lower"), c.at("upper"), c.at("work"))
		if err := unix.Mount("overlay", c.at("root"), "overlay", 0, opts); err != nil {
			return nil, errors.Join(err, c.Close(context.Background()))
		}
		return c, nil
	}
}

func (c *chroot) at(name string) string { return filepath.Join(c.dir, name) }

func (c *chroot) Run(ctx context.Context, cmd Command) (int, error) {
	p := exec.CommandContext(ctx, cmd.Args[0], cmd.Args[1:]...)
	p.Path = cmd.Args[0]
	p.Err = nil
	p.Dir, p.Env, p.Stdout, p.Stderr = cmd.Dir, cmd.Env, cmd.Output, cmd.Output
	p.SysProcAttr = &syscall.SysProcAttr{Chroot: c.at("root")}
	err := p.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

func (c *chroot) Changes(ctx context.Context, w io.Writer) error {
	return layer.Write(ctx, w, c.at("upper"), layer.Options{Overlay: true})
}

func (c *chroot) Close(context.Context) error {
	return errors.Join(unix.Unmount(c.at("root"), 0), unix.Unmount(c.at("lower"), 0))
}

// smallSystem imports an image of the host's shell and a few programs, with the
// libraries that they need.
func smallSystem(t *testing.T, s *Store) {
	t.Helper()
	entries := []entry{dir("tmp"), dir("etc"), file("etc/passwd", "root:x:0:0::/root:/bin/sh\napp:x:33:44::/:/bin/sh\n"), file("etc/group", "staff:x:50:\n")}
	seen := map[string]bool{}
	add := func(path string) {
		if seen[path] {
			return
		}
		seen[path] = true
		body, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		e := file(path, string(body))
		e.Mode = 0o755
		entries = append(entries, e)
	}
	for _, name := range []string{"sh", "cat", "rm"} {
		add("/bin/" + name)
		out, err := exec.Command("ldd", "/bin/"+name).Output()
		if err != nil {
			t.Fatal(err)
		}
		for word := range strings.FieldsSeq(string(out)) {
			if strings.HasPrefix(word, "/") {
				add(word)
			}
		}
	}
	options := ImportOptions{Name: "small", Config: Config{Env: []string{"PATH=/bin"}, Cmd: []string{"sh"}}}
	if _, err := s.Import(context.Background(), bytes.NewReader(testLayer(t, entries...)), options); err != nil {
		t.Fatal(err)
	}
}

// request reads a Dockerfile and prepares a context with the files named.
func request(t testing.TB, dockerfile string, files map[string]string) BuildRequest {
	t.Helper()
	recipe, err := ParseDockerfile(strings.NewReader(dockerfile))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, body := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(body), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return BuildRequest{Recipe: recipe, Context: dir, Names: []string{"built"}}
}

// paths returns the lines of an image's description for paths below prefix,
// without times.
func paths(t testing.TB, i Image, prefix string) string {
	t.Helper()
	var out []string
	for line := range strings.Lines(rootDescription(t, i)) {
		f := strings.SplitN(strings.TrimSpace(line), " ", 5)
		if strings.HasPrefix(f[0], prefix) {
			out = append(out, strings.Join(append(f[:3], f[4:]...), " "))
		}
	}
	return strings.Join(out, "\n")
}

// conformance: FR3.5
func TestBuildRunsDockerfile(t *testing.T) {
	s := openStore(t)
	smallSystem(t, s)
	req := request(t, `# syntax=docker/dockerfile:1
ARG TAG=latest
FROM small:${TAG} AS first
ARG WHO=nobody
ENV GREETING="hello $WHO" X=1
WORKDIR /srv/app
RUN echo "$GREETING" > greeting && \
    # a comment between
    echo $WHO >> greeting
COPY --chown=app:staff --chmod=600 src/*.txt docs /data/
RUN <<EOF
echo one > /here
cat /data/a.txt >> /here
rm /data/b.txt
EOF
RUN ["/bin/cat", "/here"]

FROM small
COPY --from=first /here /srv/app/ /copy/
EXPOSE 80 53/udp
LABEL who=$TAG
USER app
ENTRYPOINT ["/bin/echo"]
CMD ["hi"]
`, map[string]string{"src/a.txt": "A", "src/b.txt": "B", "src/c.md": "C", "docs/d": "D"})
	var out bytes.Buffer
	req.Output, req.Start, req.Args = &out, startChroot(t), map[string]string{"WHO": "world"}
	got, err := s.Build(context.Background(), req)
	if err != nil {
		t.Fatal(err)
	}
	if want := "/copy 40755 0:0\n/copy/greeting 100644 0:0 \"hello world\\nworld\\n\"\n/copy/here 100644 0:0 \"one\\nA\""; paths(t, got, "/copy") != want {
		t.Errorf("copied:\n%s\nwant:\n%s", paths(t, got, "/copy"), want)
	}
	config := fmt.Sprint(got.Config)
	if config != "{[PATH=/bin] app  [/bin/echo] [hi] [53/udp 80/tcp] map[who:] []}" {
		t.Errorf("config %s", config)
	}
	if out.String() != "one\nA" {
		t.Errorf("output %q", out.String())
	}
	req.Target, req.Names = "first", []string{"first"}
	first, err := s.Build(context.Background(), req)
	if err != nil {
		t.Fatal(err)
	}
	if want := "/data 40755 33:50\n/data/a.txt 100600 33:50 \"A\"\n/data/d 100600 33:50 \"D\""; paths(t, first, "/data") != want {
		t.Errorf("data:\n%s", paths(t, first, "/data"))
	}
}

func TestBuildTakesUnchangedStepsFromCache(t *testing.T) {
	s := openStore(t)
	smallSystem(t, s)
	text := "FROM small\nRUN echo a > /a\nCOPY f /f\nRUN cat /f > /b\n"
	build := func(body string, noCache bool) (cached string, i Image) {
		req := request(t, text, map[string]string{"f": body})
		req.Start, req.NoCache = startChroot(t), noCache
		req.Report = func(r StepReport) {
			if r.Done {
				cached += map[bool]string{true: "c", false: "-"}[r.Cached]
			}
		}
		i, err := s.Build(context.Background(), req)
		if err != nil {
			t.Fatal(err)
		}
		return cached, i
	}
	one, first := build("1", false)
	again, second := build("1", false)
	changed, third := build("2", false)
	anew, _ := build("2", true)
	if got := strings.Join([]string{one, again, changed, anew}, " "); got != "--- ccc c-- ---" {
		t.Errorf("cached %s", got)
	}
	if first.Root != second.Root || third.Root == first.Root {
		t.Error("roots do not follow contents")
	}
	if got := paths(t, third, "/b"); !strings.Contains(got, `/b 100644 0:0 "2"`) {
		t.Errorf("b: %s", got)
	}
	if _, err := s.Prune(context.Background(), nil, true); err != nil {
		t.Fatal(err)
	}
	if gone, _ := build("2", false); gone != "---" {
		t.Errorf("after prune, cached %s", gone)
	}
}

func TestFailingCommandNamesLineAndCode(t *testing.T) {
	s := openStore(t)
	smallSystem(t, s)
	req := request(t, "FROM small\n\nRUN echo out; exit 3\n", nil)
	var out bytes.Buffer
	req.Start, req.Output = startChroot(t), &out
	_, err := s.Build(context.Background(), req)
	var failed *StepError
	if !errors.As(err, &failed) || failed.Exit != 3 || failed.Step.Line != 3 || !sandbox.Is(err, sandbox.Invalid) || !strings.Contains(err.Error(), "line 3: RUN echo out; exit 3: exit code 3") {
		t.Errorf("error %v", err)
	}
	if _, err := s.Get("built"); !sandbox.Is(err, sandbox.NotFound) {
		t.Errorf("a failed build left an image: %v", err)
	}
}

func TestCopyFollowsDockersRules(t *testing.T) {
	s := openStore(t)
	if _, err := s.Import(context.Background(), bytes.NewReader(testLayer(t, dir("usr/lib"), symlink("lib", "usr/lib"),
		entry{Header: dirHeader("home/user", 0o700, 1000)}, file("usr/lib/old", "old"))), ImportOptions{Name: "base"}); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"a": "A", "d/x": "X", "d/sub/y": "Y", "d/skip.log": "L", "e/sub/z": "Z", ".dockerignore": "**/*.log\n!keep.log\n"}
	for _, c := range []struct{ step, prefix, want string }{
		{"COPY a /new", "/new", `/new 100644 0:0 "A"`},
		{"COPY a /new/", "/new", "/new 40755 0:0\n" + `/new/a 100644 0:0 "A"`},
		{"COPY a lib", "/usr/lib", "/usr/lib 40755 0:0\n" + `/usr/lib/a 100644 0:0 "A"` + "\n" + `/usr/lib/old 100644 0:0 "old"`},
		{"COPY a /home/user", "/home", "/home 40755 0:0\n/home/user 40700 1000:1000\n" + `/home/user/a 100644 0:0 "A"`},
		{"COPY d e /t/", "/t", "/t 40755 0:0\n/t/sub 40755 0:0\n" + `/t/sub/y 100644 0:0 "Y"` + "\n" + `/t/sub/z 100644 0:0 "Z"` + "\n" + `/t/x 100644 0:0 "X"`},
		{"COPY --chown=5 d/sub /t", "/t", "/t 40755 5:5\n" + `/t/y 100644 5:5 "Y"`},
		{`COPY ["a", "/json"]`, "/json", `/json 100644 0:0 "A"`},
	} {
		got, err := s.Build(context.Background(), request(t, "FROM base\n"+c.step+"\n", files))
		if err != nil {
			t.Errorf("%s: %v", c.step, err)
		} else if text := paths(t, got, c.prefix); text != c.want {
			t.Errorf("%s:\n%s\nwant:\n%s", c.step, text, c.want)
		}
	}
	for step, want := range map[string]string{
		"COPY nothing /x": "not there", "COPY d/skip.log /x": "not there", "COPY ../x /x": "climbs",
		"COPY a d /x": "slash", "COPY --chown=nobody a /x": "nobody", "RUN true": "no sandbox",
	} {
		_, err := s.Build(context.Background(), request(t, "FROM base\n"+step+"\n", files))
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "line 2") {
			t.Errorf("%s: %v", step, err)
		}
	}
}

func TestStepsCopyFromUploadedArchive(t *testing.T) {
	s := openStore(t)
	upload := filepath.Join(t.TempDir(), "upload.tar")
	if err := os.WriteFile(upload, testLayer(t, dir("app"), file("app/main.py", "print()")), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := s.Build(context.Background(), BuildRequest{Names: []string{"e2b"}, Recipe: Recipe{Stages: []Stage{{From: "scratch", Steps: []Step{
		{Op: OpWorkdir, Args: []string{"/code"}},
		{Op: OpCopy, Args: []string{"app", "."}, Archive: upload, Chown: "1000:1000"},
		{Op: OpEnv, Args: []string{"A=$literal"}},
	}}}}})
	if err != nil {
		t.Fatal(err)
	}
	if want := "/code 40755 0:0\n/code/main.py 100644 1000:1000 \"print()\""; paths(t, got, "/code") != want {
		t.Errorf("got:\n%s", paths(t, got, "/code"))
	}
	if got.Config.Env[0] != "A=$literal" {
		t.Errorf("env %q", got.Config.Env)
	}
}
