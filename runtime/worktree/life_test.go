package worktree

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/sandbox"
)

func TestSetupCopyAndArchive(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	kept := t.TempDir()
	put(t, repo, ".atoll/setup", "cat .env > from-setup; echo $ATOLL_PORT_BASE > /home/user/port\n")
	put(t, repo, ".atoll/archive", "#!/bin/bash\n[[ -d .git ]] && cat made > /keep/made\n")
	if err := os.Chmod(filepath.Join(repo, ".atoll/archive"), 0o755); err != nil {
		t.Fatal(err)
	}
	put(t, repo, ".atoll/copy", "# secrets of developers\n.env\n\n*.pem\n")
	put(t, repo, ".gitignore", ".env\n*.pem\n*.log\n")
	gitIn(t, repo, "add", "-A")
	gitIn(t, repo, "commit", "-qm", "atoll")
	put(t, repo, ".env", "KEY=value\n")
	put(t, repo, "deep/key.pem", "pem\n")
	put(t, repo, "noise.log", "noise\n")
	if err := os.Symlink("/etc/passwd", filepath.Join(repo, "link.pem")); err != nil {
		t.Fatal(err)
	}
	spec := specOf(repo)
	spec.ID = sandbox.NewID()
	spec.Mounts = []sandbox.Mount{{Source: kept, Target: "/keep"}}
	if err := r.Create(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	a := &agent{t, r, spec.ID, spec}
	if got := a.do("cat from-setup deep/key.pem; ls noise.log link.pem 2>/dev/null; true"); got != "KEY=value\npem\n" {
		t.Errorf("after setup the sandbox has %q", got)
	}
	if got := a.do("cat /home/user/port; echo $ATOLL_PORT_BASE; echo $ATOLL_BRANCH"); got != fmt.Sprintf("%d\n%d\natoll/%s\n", firstBlock, firstBlock, a.id) {
		t.Errorf("the sandbox is told %q", got)
	}
	a.do("echo the end > made")
	if err := r.Destroy(t.Context(), spec.ID); err != nil {
		t.Fatal(err)
	}
	if got := read(t, kept, "made"); got != "the end\n" {
		t.Errorf("the archive script kept %q", got)
	}
}

func TestASetupThatFailsSaysWhyAndLeavesNothing(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	put(t, repo, ".atoll/setup", "echo the reason >&2; exit 3\n")
	gitIn(t, repo, "add", "-A")
	gitIn(t, repo, "commit", "-qm", "atoll")
	before := traces(t, r, repo)
	spec := specOf(repo)
	spec.ID = sandbox.NewID()
	err := r.Create(t.Context(), spec)
	wantKind(t, err, sandbox.Invalid)
	if !strings.Contains(err.Error(), "the reason") || sandbox.HintOf(err) == "" {
		t.Errorf("the error is %v", err)
	}
	if after := traces(t, r, repo); !slices.Equal(before, after) {
		t.Errorf("left behind: %v", after)
	}
}

func TestPortBlocksDoNotMeet(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	seen := map[string]bool{}
	var first *agent
	for range 4 {
		a := start(t, r, repo)
		port := a.do("echo $ATOLL_PORT_BASE")
		if seen[port] {
			t.Errorf("two sandboxes have the ports from %s", port)
		}
		seen[port] = true
		if first == nil {
			first = a
		}
	}
	if err := r.Destroy(t.Context(), first.id); err != nil {
		t.Fatal(err)
	}
	if got := start(t, r, repo).do("echo $ATOLL_PORT_BASE"); got != fmt.Sprintf("%d\n", firstBlock) {
		t.Errorf("a block that is free again is not given: %s", got)
	}
	if _, ok := freePorts(map[int]bool{}); !ok {
		t.Error("no ports though none are taken")
	}
	full := map[int]bool{}
	for p := firstBlock; p < lastBlock; p += portBlock {
		full[p] = true
	}
	if _, ok := freePorts(full); ok {
		t.Error("ports though all are taken")
	}
}

func TestBadRepositoriesAndLabelsAreRefusedWithAHint(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	empty := t.TempDir()
	gitIn(t, empty, "init", "-q")
	for name, edit := range map[string]func(*sandbox.Spec){
		"no repository":  func(s *sandbox.Spec) { s.Root.Path = t.TempDir() },
		"missing":        func(s *sandbox.Spec) { s.Root.Path = "/nonexistent" },
		"relative":       func(s *sandbox.Spec) { s.Root.Path = "." },
		"no commit":      func(s *sandbox.Spec) { s.Root.Path = empty },
		"unknown base":   label(LabelBase, "nowhere"),
		"option as base": label(LabelBase, "--all"),
		"bad branch":     label(LabelBranch, "../x"),
		"locked branch":  label(LabelBranch, "a.lock/b"),
	} {
		t.Run(name, func(t *testing.T) {
			spec := specOf(repo)
			spec.ID = sandbox.NewID()
			edit(&spec)
			err := r.Create(t.Context(), spec)
			wantKind(t, err, sandbox.Invalid)
			t.Log(err)
		})
	}
}

func TestASandboxStartsFromTheBaseItNames(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	gitIn(t, repo, "tag", "old")
	put(t, repo, "README.md", "new\n")
	put(t, repo, "uncommitted", "x\n")
	gitIn(t, repo, "commit", "-qam", "second")
	if got := start(t, r, repo, label(LabelBase, "old")).do("cat README.md; ls"); got != "hello\nREADME.md\nsrc\n" {
		t.Errorf("from the old base the sandbox has %q", got)
	}
	bare := filepath.Join(t.TempDir(), "bare.git")
	gitIn(t, repo, "clone", "-q", "--bare", repo, bare)
	b := start(t, r, bare)
	if got := b.do("cat README.md; git status --porcelain"); got != "new\n" {
		t.Errorf("from a bare repository the sandbox has %q", got)
	}
	b.do("echo x > x")
	_, err := r.Merge(t.Context(), b.id, MergeOptions{})
	wantKind(t, err, sandbox.Invalid)
	branch, commit, err := r.Publish(t.Context(), b.id, "work")
	if err != nil || strings.TrimSpace(gitIn(t, bare, "rev-parse", branch)) != commit {
		t.Errorf("Publish into a bare repository: %s %s %v", branch, commit, err)
	}
	linked := filepath.Join(t.TempDir(), "linked")
	gitIn(t, repo, "worktree", "add", "-q", "-b", "side", linked)
	c := start(t, r, linked)
	c.do("echo side > side")
	if _, err := r.Merge(t.Context(), c.id, MergeOptions{}); err != nil || read(t, linked, "side") != "side\n" {
		t.Errorf("Merge into a linked worktree: %v", err)
	}
}

func TestARestoredSandboxHasItsUncommittedWorkAndBranch(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	a := start(t, r, repo, label(LabelBranch, "topic"))
	a.do("echo ignored > x.log; echo staged > s; git add s; rm README.md; echo committed > c; git add c; git commit -qm c -- c; git stash list; echo home > ~/h; echo tmp > /tmp/t")
	want := a.do("git status --porcelain --ignored --branch; git log --format=%s; cat ~/h /tmp/t")
	dir := t.TempDir()
	if err := r.Snapshot(t.Context(), a.id, dir, sandbox.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	spec := specOf(repo)
	spec.ID = sandbox.NewID()
	if err := r.Restore(t.Context(), spec, dir); err != nil {
		t.Fatal(err)
	}
	b := &agent{t, r, spec.ID, spec}
	if got := b.do("git status --porcelain --ignored --branch; git log --format=%s; cat ~/h /tmp/t"); got != want {
		t.Errorf("the restored sandbox has\n%s\nwant\n%s", got, want)
	}
	if err := r.Destroy(t.Context(), spec.ID); err != nil {
		t.Fatal(err)
	}
}

func TestForksDoNotMeetInOneBranch(t *testing.T) {
	for _, own := range []string{"", "topic"} {
		repo, r := newRepo(t), open(t, t.TempDir())
		a := start(t, r, repo, label(LabelBranch, own))
		dir := t.TempDir()
		if err := r.Snapshot(t.Context(), a.id, dir, sandbox.SnapshotOptions{}); err != nil {
			t.Fatal(err)
		}
		branches := map[string]bool{}
		for i := range 2 {
			spec := a.spec
			spec.ID = sandbox.NewID()
			if err := r.Restore(t.Context(), spec, dir); err != nil {
				t.Fatal(err)
			}
			fork := &agent{t, r, spec.ID, spec}
			fork.do(fmt.Sprintf("echo %d > work", i))
			branch, _, err := r.Publish(t.Context(), fork.id, "work")
			if err != nil || branches[branch] || branch == own {
				t.Errorf("fork %d is published as %q: %v", i, branch, err)
			}
			branches[branch] = true
			if err := r.Destroy(t.Context(), spec.ID); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Snapshot(t.Context(), a.id, t.TempDir(), sandbox.SnapshotOptions{Stop: true}); err != nil {
			t.Fatal(err)
		}
		if err := r.Restore(t.Context(), a.spec, dir); err != nil {
			t.Fatal(err)
		}
		if branch, _, err := r.Publish(t.Context(), a.id, ""); err != nil || own != "" && branch != own {
			t.Errorf("after stop and restore the work is published as %q, %v; want %q", branch, err, own)
		}
	}
}

func TestRunningOutOfMemoryIsTold(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	if !r.caps.MemLimit {
		t.Skip("no privilege to make control groups")
	}
	events := r.Watch(t.Context())
	a := start(t, r, repo, func(s *sandbox.Spec) { s.Resources.Memory = 64 << 20 })
	a.try("head -c 500000000 /dev/zero | tail -n 1")
	for e := range events {
		if e.Sandbox == a.id && strings.Contains(e.Reason, "memory") {
			return
		}
	}
}

// conformance: NFR1.3
func TestASandboxHasNoPrivileges(t *testing.T) {
	repo, r := newRepo(t), open(t, t.TempDir())
	a := start(t, r, repo)
	for script, want := range map[string]string{
		"grep -E '^(CapEff|CapPrm|CapBnd|CapAmb)' /proc/self/status | cut -f2 | sort -u":                                    "0000000000000000\n",
		"grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status | cut -f2 | tr -d '\\n'":                                        "12",
		"unshare -r true 2>/dev/null; echo $?":                                                                              "1\n",
		"mount -t tmpfs x /mnt 2>/dev/null; echo $?":                                                                        "32\n",
		"chroot / true 2>/dev/null; echo $?":                                                                                "125\n",
		"echo x > /usr/bin/x; echo x > /proc/sys/kernel/core_pattern; echo b > /proc/sysrq-trigger; echo x > /bin/sh; true": "",
		"[ ! -s /proc/kcore ] && echo hidden":                                                                               "hidden\n",
		"ls /etc/shadow /root 2>/dev/null":                                                                                  "",
		"ls -d /proc/[0-9]* | wc -l | awk '{ print $1 < 10 }'":                                                              "1\n",
		"cat /proc/1/comm": "guest\n",
		"ls /run/atoll/guest && echo x >> /run/atoll/guest; ls /.base /.layers 2>/dev/null": "/run/atoll/guest\n",
		"script -qec 'tty' /dev/null | tr -d '\\r'":                                         "/dev/pts/0\n",
		"df --output=target / /work /tmp | tail -n +2 | tr '\\n' ' '":                       "/ /work /tmp ",
	} {
		if got := a.try(script); string(got.Stdout) != want {
			t.Errorf("%s\ngives %q %s, want %q", script, got.Stdout, got.Stderr, want)
		}
	}
}

// TestADaemonThatWasKilledLeavesItsSandboxes kills a process that owns a
// runtime, and opens the directory again.
//
// conformance: FR1.1
func TestADaemonThatWasKilledLeavesItsSandboxes(t *testing.T) {
	if os.Getenv("WORKTREE_TEST_DAEMON") != "" {
		daemonForTest(t)
		return
	}
	repo, dir := newRepo(t), t.TempDir()
	open(t, dir).Close() // skips where there is no privilege
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestADaemonThatWasKilledLeavesItsSandboxes$")
	cmd.Env = append(os.Environ(), "WORKTREE_TEST_DAEMON=1", "DIR="+dir, "REPO="+repo, "ATOLL_GUEST="+guesttest.Binary(t))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make([]byte, 5)
	if _, err := io.ReadFull(out, ready); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Dir: dir, Guest: guesttest.Binary(t)}); !sandbox.Is(err, sandbox.Conflict) {
		t.Errorf("a second runtime on the directory: %v, want conflict", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	put(t, dir, "s/halfmade/home/file", "of a create that was cut short")
	put(t, dir, "bases/new-123/tree/file", "of a checkout that was cut short")

	r := open(t, dir)
	all, err := r.List(t.Context())
	if err != nil || len(all) != 1 || all[0].State != sandbox.Running {
		t.Fatalf("List: %+v, %v; want the one that runs", all, err)
	}
	a := &agent{t, r, all[0].ID, all[0].Spec}
	if got := a.do("cat mark"); got != "made before\n" {
		t.Errorf("its file holds %q", got)
	}
	if got := traces(t, r, repo); len(got) != 4 {
		t.Errorf("on the host there are %q, want one directory, control group, process and pin", got)
	}
	if err := r.Destroy(t.Context(), a.id); err != nil {
		t.Fatal(err)
	}
	if got := traces(t, r, repo); len(got) != 0 {
		t.Errorf("left behind: %q", got)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, dir)
	if bases, _ := os.ReadDir(filepath.Join(dir, "bases")); len(bases) != 0 {
		t.Errorf("checkouts that nobody uses stay: %v", bases)
	}
}

// daemonForTest owns a runtime with a sandbox until it is killed.
func daemonForTest(t *testing.T) {
	r, err := New(Config{Dir: os.Getenv("DIR"), Guest: os.Getenv("ATOLL_GUEST")})
	if err != nil {
		t.Fatal(err)
	}
	spec := specOf(os.Getenv("REPO"))
	spec.ID = sandbox.NewID()
	if err := r.Create(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	(&agent{t, r, spec.ID, spec}).do("echo made before > mark")
	fmt.Print("ready")
	select {}
}

func TestASandboxActsAsTheOwnerOfItsRepository(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can act for others")
	}
	repo, dir := newRepo(t), t.TempDir()
	const uid = 12345
	if err := giveTo(repo, uid, uid); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(repo, 0o700); err != nil {
		t.Fatal(err)
	}
	letThrough(t, repo)
	r := open(t, dir)
	a := start(t, r, repo)
	a.do("git status --porcelain --branch; echo work > work; chmod 600 README.md; echo more >> src/main.go; git commit -qam agent")
	if err := r.Snapshot(t.Context(), a.id, t.TempDir(), sandbox.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Merge(t.Context(), a.id, MergeOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"work", ".git/refs/heads/atoll/" + a.id, ".git/index"} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(repo, name), &st); err != nil || st.Uid != uid {
			t.Errorf("%s belongs to %d (%v), want the repository's owner", name, st.Uid, err)
		}
	}
}

// letThrough lets other users reach a directory of the test.
func letThrough(t *testing.T, dir string) {
	for d := filepath.Dir(dir); d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWithoutRootASandboxWorksToo(t *testing.T) {
	if os.Getenv("WORKTREE_TEST_USER") != "" {
		workWithoutRoot(t)
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("only root can become somebody else; the other tests run without root already")
	}
	const uid = 12346
	repo, dir := newRepo(t), t.TempDir()
	for _, d := range []string{repo, dir} {
		if err := giveTo(d, uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	// The test binary itself lies where others may not look.
	self := filepath.Join(dir, "test")
	if err := copyFile("/proc/self/exe", self); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(self, 0o755); err != nil {
		t.Fatal(err)
	}
	guestCopy := filepath.Join(dir, "guest")
	if err := copyFile(guesttest.Binary(t), guestCopy); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(guestCopy, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.v", "-test.run=^TestWithoutRootASandboxWorksToo$")
	cmd.Env = append(os.Environ(), "WORKTREE_TEST_USER=1", "DIR="+filepath.Join(dir, "state"), "REPO="+repo, "ATOLL_GUEST="+guestCopy, "HOME="+dir, "TMPDIR="+dir)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential(uid)}
	letThrough(t, dir)
	letThrough(t, repo)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if bytes.Contains(out, []byte("SKIP")) {
		t.Skipf("no privilege: %s", out)
	}
}

// workWithoutRoot is the part of the test that runs as somebody else.
func workWithoutRoot(t *testing.T) {
	r, repo := open(t, os.Getenv("DIR")), os.Getenv("REPO")
	a := start(t, r, repo)
	a.do("git status --porcelain --branch; echo work > work; mkdir -m 000 closed; ( echo x > /tmp/x )")
	if err := r.Pause(t.Context(), a.id); err != nil {
		t.Fatal(err)
	}
	if err := r.Resume(t.Context(), a.id); err != nil {
		t.Fatal(err)
	}
	a.do("rmdir closed; mkdir -p sealed/in; chmod 500 sealed")
	dir := t.TempDir()
	if err := r.Snapshot(t.Context(), a.id, dir, sandbox.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	spec := specOf(repo)
	spec.ID = sandbox.NewID()
	if err := r.Restore(t.Context(), spec, dir); err != nil {
		t.Fatal(err)
	}
	if got := (&agent{t, r, spec.ID, spec}).do("cat work"); got != "work\n" {
		t.Errorf("the fork has %q", got)
	}
	if err := r.Destroy(t.Context(), spec.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Merge(t.Context(), a.id, MergeOptions{}); err != nil || read(t, repo, "work") != "work\n" {
		t.Errorf("Merge: %v", err)
	}
	if _, err := r.Dial(t.Context(), a.id, 80); !sandbox.Is(err, sandbox.Unsupported) {
		t.Errorf("Dial of a port without root: %v, want unsupported", err)
	}
	if st, err := r.Stats(t.Context(), a.id); err != nil || st.Pids < 1 || st.Memory <= 0 {
		t.Errorf("Stats: %+v, %v", st, err)
	}
}

func credential(uid uint32) *syscall.Credential { return &syscall.Credential{Uid: uid, Gid: uid} }

func TestASandboxEntersTheNetworkThatWasMadeForIt(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can enter a network")
	}
	name := fmt.Sprintf("atoll-test-%d", os.Getpid())
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		t.Skipf("no network namespaces here: %v %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", name).Run() })
	var ours, theirs unix.Stat_t
	if err := errors.Join(unix.Stat("/proc/self/ns/net", &ours), unix.Stat("/run/netns/"+name, &theirs)); err != nil {
		t.Fatal(err)
	}
	repo, r := newRepo(t), open(t, t.TempDir())
	a := start(t, r, repo, func(s *sandbox.Spec) {
		s.Network = sandbox.NetworkSandbox
		s.Link = &sandbox.Link{NetNS: "/run/netns/" + name, Gateway: netip.MustParseAddr("10.1.2.3")}
	})
	if got, want := a.do("readlink /proc/self/ns/net; cat /etc/resolv.conf"), fmt.Sprintf("net:[%d]\nnameserver 10.1.2.3\n", theirs.Ino); got != want {
		t.Errorf("the sandbox's network is %q, want %q", got, want)
	}
	a.do(`setsid perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(Listen => 5, LocalAddr => "127.0.0.1", LocalPort => 8080) or die; open(F, ">up"); close F; while ($c = $s->accept) { print $c "hi\n"; close $c }' >/dev/null 2>&1 </dev/null & while [ ! -e up ]; do sleep 0.05; done`)
	conn, err := r.Dial(t.Context(), a.id, 8080)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got, err := io.ReadAll(conn); err != nil || string(got) != "hi\n" {
		t.Errorf("read %q, %v", got, err)
	}
	// The threads that went there did not come back.
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		var st unix.Stat_t
		if err := unix.Stat(task, &st); err == nil && st.Ino != ours.Ino {
			t.Errorf("the thread %s is in another network", task)
		}
	}
}

func TestManifestsOfOthersAreRefused(t *testing.T) {
	for _, text := range []string{"", "{}", `{"Format":2}`, `{"Format":1,"ID":"a","Base":"--all","Branch":"x"}`, `{"Format":1,"ID":"a","Base":"` + strings.Repeat("a", 40) + `","Branch":"../x"}`} {
		if _, err := parseManifest([]byte(text)); err == nil {
			t.Errorf("%s is taken for a manifest", text)
		}
	}
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"Format":1,"ID":"a","Base":"` + strings.Repeat("a", 40) + `","Branch":"x","SHA256":{"a":"b"}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if m, err := parseManifest(text); err == nil && (strings.HasPrefix(m.Base, "-") || strings.Contains(m.Branch, "..")) {
			t.Errorf("accepted %+v", m)
		}
	})
}

func TestATailKeepsTheEnd(t *testing.T) {
	var kept tail
	for range 100_000 {
		_, _ = io.WriteString(&kept, "0123456789")
	}
	_, _ = io.WriteString(&kept, "end")
	if got := kept.String(); len(got) > 4*tailSize || !strings.HasSuffix(got, "9end") {
		t.Errorf("kept %d bytes that end with %q", len(got), got[len(got)-4:])
	}
}
