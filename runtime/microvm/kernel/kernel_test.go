package kernel

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"

	"github.com/atoll-run/atoll/sandbox"
)

// vmlinux is an ELF file with one segment of notes, of which one is the entry.
func vmlinux() []byte {
	le := binary.LittleEndian
	b := make([]byte, 120, 300)
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 2)  // executable
	le.PutUint16(b[18:], 62) // x86-64
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[32:], 64) // program headers
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 1)
	note := append([]byte{4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0}, "Xen\x00\x00\x00\x10\x00"...)
	le.PutUint32(b[64:], 4) // PT_NOTE
	le.PutUint64(b[72:], 120)
	le.PutUint64(b[96:], uint64(len(note)))
	return append(append(b, note...), "Linux version 6.9.9-test (somebody)\n"...)
}

// bzImage wraps a payload.
func bzImage(payload []byte) []byte {
	const setup = 2
	b := make([]byte, (setup+1)*sector)
	b[bzSetupSects] = setup
	copy(b[bzMagic:], "HdrS")
	le := binary.LittleEndian
	le.PutUint16(b[bzProtocol:], 0x20f)
	le.PutUint16(b[bzVersion:], 0x300-0x200)
	copy(b[0x300:], "6.9.9-test (somebody) #1\x00")
	le.PutUint32(b[bzPayload:], 16)
	le.PutUint32(b[bzPayloadLength:], uint32(len(payload)))
	return append(append(b, make([]byte, 16)...), payload...)
}

// compressions are those of kernels in use; behind the data is its size.
func compressions(t *testing.T, plain []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	pack := func(name string, w interface {
		Write([]byte) (int, error)
		Close() error
	}, err error, b *bytes.Buffer) {
		if err == nil {
			_, err = w.Write(plain)
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		out[name] = binary.LittleEndian.AppendUint32(b.Bytes(), uint32(len(plain)))
	}
	var g, z, x, l bytes.Buffer
	pack("gzip", gzip.NewWriter(&g), nil, &g)
	zw, err := zstd.NewWriter(&z)
	pack("zstd", zw, err, &z)
	xw, err := xz.NewWriter(&x)
	pack("xz", xw, err, &x)
	lw := lz4.NewWriter(&l)
	err = lw.Apply(lz4.LegacyOption(true))
	pack("lz4", lw, err, &l)
	return out
}

func TestTheKernelIsTakenOutOfItsBootImage(t *testing.T) {
	plain := vmlinux()
	for name, payload := range compressions(t, plain) {
		img, err := extract(bzImage(payload))
		if err != nil || !bytes.Equal(img.data, plain) || img.version != "6.9.9-test" {
			t.Errorf("%s: %d bytes of version %q, %v", name, len(img.data), img.version, err)
		}
	}
	if img, err := extract(plain); err != nil || img.version != "6.9.9-test" {
		t.Errorf("a vmlinux is of version %q, %v", img.version, err)
	}
	unknown := bzImage([]byte("in a way of compressing that nobody knows"))
	if img, err := extract(unknown); err != nil || !bytes.Equal(img.data, unknown) {
		t.Errorf("a boot image that cannot be opened is not left as it is: %v", err)
	}
	for name, bad := range map[string][]byte{"text": []byte("hello"), "cut": unknown[:len(unknown)-1], "ELF": []byte("\x7fELF")} {
		if _, err := extract(bad); err == nil {
			t.Errorf("%s is taken for a kernel", name)
		}
	}
}

func FuzzExtract(f *testing.F) {
	f.Add(bzImage([]byte("x")))
	f.Add(vmlinux())
	f.Fuzz(func(_ *testing.T, data []byte) { _, _ = extract(data) })
}

func FuzzDeb(f *testing.F) {
	f.Add([]byte("!<arch>\ndata.tar        0           0     0     100644  4         `\nabcd"))
	f.Fuzz(func(_ *testing.T, data []byte) {
		r, err := debData(bytes.NewReader(data))
		if err == nil {
			_, _ = r.Read(make([]byte, 100))
		}
	})
}

func TestDependsNamesThePartsOfAKernel(t *testing.T) {
	got := depends("Package: linux-image-virtual\nDepends: linux-image-6.8.0-31-generic:amd64 (= 1) | x, linux-base (>= 4), linux-modules-6.8.0-31-generic\nRecommends: linux-image-9-x\n")
	if want := []string{"linux-image-6.8.0-31-generic", "linux-modules-6.8.0-31-generic"}; !slices.Equal(got, want) {
		t.Errorf("depends on %q, want %q", got, want)
	}
	if got := extraModules(got); got != "linux-modules-extra-6.8.0-31-generic" {
		t.Errorf("the rest is in %q", got)
	}
}

func fetch(t *testing.T, o Options) (Kernel, error) {
	t.Helper()
	o.Log = slog.New(slog.DiscardHandler)
	return Fetch(t.Context(), o)
}

func TestAKernelOfTheUsersIsKeptByItsContentAndMadeAnewWhenDamaged(t *testing.T) {
	dir, from := t.TempDir(), t.TempDir()
	path, guest := filepath.Join(from, "bzImage"), filepath.Join(from, "guest")
	if err := os.WriteFile(path, bzImage(compressions(t, vmlinux())["zstd"]), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(guest, []byte("agent"), 0o700); err != nil {
		t.Fatal(err)
	}
	o := Options{Dir: dir, Guest: guest, Kernel: path}
	first, err := fetch(t, o)
	if err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(first.Vmlinux); err != nil || !bytes.Equal(data, vmlinux()) || first.Version != "6.9.9-test" {
		t.Errorf("the kernel is %+v, %v", first, err)
	}
	if data, err := os.ReadFile(first.Initramfs); err != nil || !bytes.Contains(data, []byte("agent")) {
		t.Errorf("the initramfs lacks the agent, %v", err)
	}
	// What a call that was killed left behind goes; what was damaged is replaced.
	if err := os.Mkdir(filepath.Join(dir, newPrefix+"left"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{first.Vmlinux, first.Initramfs} {
		if err := os.Chmod(file, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte("damage"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	second, err := fetch(t, o)
	if err != nil || second != first {
		t.Errorf("fetched again it is %+v, %v", second, err)
	}
	if data, _ := os.ReadFile(first.Vmlinux); !bytes.Equal(data, vmlinux()) {
		t.Error("a damaged kernel is used")
	}
	if data, _ := os.ReadFile(first.Initramfs); !bytes.Contains(data, []byte("agent")) {
		t.Error("a damaged initramfs is used")
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), newPrefix) {
			t.Errorf("%s is left behind", e.Name())
		}
	}
	if err := os.WriteFile(guest, []byte("another"), 0o700); err != nil {
		t.Fatal(err)
	}
	third, err := fetch(t, o)
	if err != nil || third.Digest == first.Digest || third.Vmlinux != first.Vmlinux {
		t.Errorf("with another agent it is %+v, %v", third, err)
	}
	o.Kernel = filepath.Join(from, "missing")
	if _, err := fetch(t, o); !sandbox.Is(err, sandbox.NotFound) {
		t.Errorf("a kernel that is missing: %v", err)
	}
}
