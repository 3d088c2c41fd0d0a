package server

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// FuzzUnpack extracts whatever comes: nothing may appear or change outside.
func FuzzUnpack(f *testing.F) {
	add := func(headers ...tar.Header) {
		var buf bytes.Buffer
		w := tar.NewWriter(&buf)
		for _, h := range headers {
			if h.Typeflag == tar.TypeReg {
				h.Size = 4
			}
			if err := w.WriteHeader(&h); err != nil {
				f.Fatal(err)
			}
			if h.Typeflag == tar.TypeReg {
				_, _ = io.WriteString(w, "evil")
			}
		}
		_ = w.Close()
		f.Add(buf.Bytes())
	}
	add(tar.Header{Name: "a/b", Typeflag: tar.TypeReg, Mode: 0o644})
	add(tar.Header{Name: "../outside/secret", Typeflag: tar.TypeReg})
	add(tar.Header{Name: "s", Typeflag: tar.TypeSymlink, Linkname: "../outside"}, tar.Header{Name: "s/secret", Typeflag: tar.TypeReg})
	add(tar.Header{Name: "s", Typeflag: tar.TypeSymlink, Linkname: "../outside"}, tar.Header{Name: "s/", Typeflag: tar.TypeDir, Mode: 0o777})
	add(tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "../outside/secret"}, tar.Header{Name: "h", Typeflag: tar.TypeReg})
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		outside := filepath.Join(dir, "outside")
		if err := os.Mkdir(outside, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(outside+"/secret", []byte("keep"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(dir+"/in", 0o755); err != nil {
			t.Fatal(err)
		}
		root, err := os.OpenRoot(dir + "/in")
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		u := unpacker{root: root, buf: make([]byte, 4096)}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_ = u.all(ctx, tar.NewReader(bytes.NewReader(data)))
		got, err := os.ReadFile(outside + "/secret")
		if err != nil || string(got) != "keep" {
			t.Fatalf("outside changed: %q %v", got, err)
		}
		info, err := os.Stat(outside)
		if err != nil || info.Mode().Perm() != 0o755 {
			t.Fatalf("outside changed: %v %v", info, err)
		}
		for at, want := range map[string]int{dir: 2, outside: 1} {
			if names, err := os.ReadDir(at); err != nil || len(names) != want {
				t.Fatalf("%s: %v %v", at, names, err)
			}
		}
	})
}

func FuzzMultipart(f *testing.F) {
	f.Add(`form-data; name="file"; filename="/a/b"`)
	f.Add(`form-data; name=file; filename*=UTF-8''%2e%2e%2fx`)
	f.Fuzz(func(t *testing.T, disposition string) {
		name, err := partName(disposition)
		if err != nil {
			return
		}
		s := &settings{}
		if path, err := s.resolve(name, account{home: "/home/u"}); err == nil && (!filepath.IsAbs(path) || strings.Contains(path, "/../") || strings.ContainsRune(path, 0)) {
			t.Fatalf("%q becomes %q", name, path)
		}
	})
}

func FuzzAccounts(f *testing.F) {
	f.Add(testAccounts.passwd, testAccounts.group, "user:docker")
	f.Add([]byte("a:b:1:2:c:d:e"), []byte(":::"), "1")
	f.Fuzz(func(t *testing.T, passwd, group []byte, spec string) {
		a := accounts{passwd, group}
		if acct, err := a.lookup(spec); err == nil && (acct.uid < 0 || acct.gid < 0 || acct.home == "" || acct.shell == "") {
			t.Fatalf("got %+v", acct)
		}
		a.names()
	})
}

func FuzzKernelText(f *testing.F) {
	f.Add([]byte("42 (a) b (c)) S 7 41 40 0 -1 4194560 1 2 3 4 150 50 0 0"))
	f.Add([]byte("cpu  10 20 30 400 50 6 7 8 9 10\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		parseStat(text)
		busyTime(text)
		field(text, "oom_kill")
		if hosts := renameHost(string(text), "old", "new"); !strings.HasSuffix(hosts, "127.0.1.1\tnew\n") {
			t.Fatalf("got %q", hosts)
		}
	})
}

// FuzzLines checks that the log loses nothing of a process's output and keeps
// its bounds, however the output is cut into pieces.
func FuzzLines(f *testing.F) {
	f.Add("one\ntwo", 2)
	f.Add(strings.Repeat("x", 3*maxLine)+"\n\n", 1000)
	f.Fuzz(func(t *testing.T, text string, step int) {
		if step < 1 || len(text) > 1<<16 {
			return
		}
		ring := newLogRing()
		w := lineWriter{logs: ring, p: &process{child: &child{}}, event: "stdout"}
		for rest := text; len(rest) > 0; {
			n := min(step, len(rest))
			w.write([]byte(rest[:n]))
			rest = rest[n:]
		}
		w.write(nil)
		if len(w.rest) != 0 || ring.bytes > logBytes {
			t.Fatalf("%d bytes left over, %d kept", len(w.rest), ring.bytes)
		}
		if ends := uint64(strings.Count(text, "\n")); ring.seq < ends {
			t.Fatalf("%d entries for %d lines", ring.seq, ends)
		}
	})
}
