package runtimetest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

var isolationTests = []test{
	{"sandboxes have their own files", nil, testOwnFiles},
	{"sandboxes have their own processes", canIsolate, testOwnProcesses},
	{"sandboxes do not see the host's files", canIsolate, testHostFiles},
	{"without network there is only loopback", func(c sandbox.Capabilities) bool {
		return canIsolate(c) && slices.Contains(c.Networks, sandbox.NetworkNone)
	}, testNoNetwork},
	{"mounts appear and read-only ones stay as they are", func(c sandbox.Capabilities) bool { return c.Mounts }, testMounts},
}

func testOwnFiles(t *testing.T, s *suite) {
	a, b := s.create(t), s.create(t)
	a.write("secret", []byte("of a"))
	if out := b.sh("cat secret"); out.Exit == 0 {
		t.Errorf("b reads a's file: %q", out.Stdout)
	}
	b.write("secret", []byte("of b"))
	if got := string(a.read("secret")); got != "of a" {
		t.Errorf("b wrote into a's file: %q", got)
	}
	if !canIsolate(s.caps) {
		return
	}
	a.must("echo of a > /tmp/shared")
	if out := b.sh("cat /tmp/shared"); out.Exit == 0 {
		t.Errorf("/tmp is shared: %q", out.Stdout)
	}
}

func testOwnProcesses(t *testing.T, s *suite) {
	a, b := s.create(t), s.create(t)
	a.must("setsid sleep 98765 >/dev/null 2>&1 </dev/null &")
	// The brackets keep the search from finding itself.
	const search = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'sleep 9876[5]'"
	eventually(t, "a sees its own process", func() bool { return strings.TrimSpace(a.sh(search).Stdout) == "1" })
	if got := strings.TrimSpace(b.sh(search).Stdout); got != "0" {
		t.Errorf("b sees %s of a's processes", got)
	}
}

func testHostFiles(t *testing.T, s *suite) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("of the host"), 0o666); err != nil {
		t.Fatal(err)
	}
	b := s.create(t)
	if out := b.sh("cat " + secret); out.Exit == 0 {
		t.Errorf("the sandbox reads a file of the host: %q", out.Stdout)
	}
	// What is written in system places stays inside, if it is allowed at all.
	b.sh("echo x > /etc/atoll-escape; echo x > /usr/atoll-escape; echo x > /tmp/atoll-escape")
	for _, dir := range []string{"/etc", "/usr", "/tmp"} {
		if _, err := os.Lstat(filepath.Join(dir, "atoll-escape")); err == nil {
			t.Errorf("the sandbox wrote into the host's %s", dir)
			_ = os.Remove(filepath.Join(dir, "atoll-escape"))
		}
	}
}

func testNoNetwork(t *testing.T, s *suite) {
	b := s.create(t, func(spec *sandbox.Spec) { spec.Network, spec.Link = sandbox.NetworkNone, nil })
	for line := range strings.Lines(b.must("cat /proc/net/dev")) {
		name, _, ok := strings.Cut(strings.TrimSpace(line), ":")
		if ok && name != "lo" {
			t.Errorf("without network there is an interface %s", name)
		}
	}
}

func testMounts(t *testing.T, s *suite) {
	readOnly, writable := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(readOnly, "file"), []byte("from the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	b := s.create(t, func(spec *sandbox.Spec) {
		spec.Mounts = []sandbox.Mount{
			{Source: readOnly, Target: "/mnt/ro", ReadOnly: true},
			{Source: writable, Target: "/mnt/rw"},
		}
	})
	if got := b.must("cat /mnt/ro/file"); got != "from the host" {
		t.Errorf("the mounted file reads %q", got)
	}
	if out := b.sh("echo x > /mnt/ro/new"); out.Exit == 0 {
		t.Error("a read-only mount was written")
	}
	b.must("echo from inside > /mnt/rw/new")
	if got, err := os.ReadFile(filepath.Join(writable, "new")); err != nil || string(got) != "from inside\n" {
		t.Errorf("the host reads %q, %v from a writable mount", got, err)
	}
	for _, m := range []sandbox.Mount{
		{Source: filepath.Join(readOnly, "missing"), Target: "/mnt/x"},
		{Source: "relative", Target: "/mnt/x"},
		{Source: readOnly, Target: "/mnt/../../x"},
	} {
		err := s.Runtime.Create(deadline(t), s.spec(func(spec *sandbox.Spec) { spec.Mounts = []sandbox.Mount{m} }))
		wantKind(t, "Create with mount "+m.Source+":"+m.Target, err, sandbox.Invalid, sandbox.NotFound)
	}
}
