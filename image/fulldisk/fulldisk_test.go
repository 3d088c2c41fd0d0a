package fulldisk

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

// qemuImg runs the program with that name.
func qemuImg(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		t.Fatalf("scripts/deps installs qemu-img: %v: %s", err, out)
	}
}

// disk makes a raw file of 1 MiB with a boot sector and random content.
func disk(t testing.TB) string {
	t.Helper()
	data := make([]byte, 1<<20)
	source := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < len(data)/2; i += 8 {
		binary.LittleEndian.PutUint64(data[i:], source.Uint64())
	}
	copy(data[510:], "\x55\xaa")
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// check calls Check for a file.
func check(t testing.TB, path string) (Image, error) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return Check(bytes.NewReader(data), int64(len(data)))
}

func TestAnImageThatRefersToOtherFilesIsRefused(t *testing.T) {
	dir, raw := t.TempDir(), disk(t)
	stacked, external, vmdk, locked := filepath.Join(dir, "stacked"), filepath.Join(dir, "external"), filepath.Join(dir, "vmdk"), filepath.Join(dir, "locked")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", raw, stacked)
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "data_file="+filepath.Join(dir, "data"), external, "1M")
	qemuImg(t, "create", "-q", "-f", "vmdk", vmdk, "1M")
	qemuImg(t, "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=x", "-o", "encrypt.format=aes,encrypt.key-secret=s", locked, "1M")
	for path, why := range map[string]string{stacked: "stands on another", external: "in another file", vmdk: "VMDK", locked: "encrypted"} {
		img, err := Inspect(path)
		if !sandbox.Is(err, sandbox.Invalid) || !strings.Contains(err.Error(), why) {
			t.Errorf("%s is taken for %+v, %v", path, img, err)
		}
		if img, err := check(t, path); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%s is checked as %+v, %v", path, img, err)
		}
	}
	if img, err := Inspect(raw); err != nil || img != (Image{Raw, 1 << 20}) {
		t.Errorf("a raw image is %+v, %v", img, err)
	}
	if _, err := Inspect(filepath.Join(dir, "missing")); !sandbox.Is(err, sandbox.NotFound) {
		t.Errorf("a missing image: %v", err)
	}
}

func TestAnImageThatWasCutShortIsDamaged(t *testing.T) {
	raw := disk(t)
	for _, options := range [][]string{nil, {"-c"}, {"-o", "cluster_size=512"}, {"-o", "compat=0.10"}, {"-o", "extended_l2=on"}, {"-c", "-o", "compression_type=zstd"}} {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		qemuImg(t, append(append([]string{"convert", "-O", "qcow2"}, options...), raw, path)...)
		if img, err := check(t, path); err != nil || img != (Image{QCOW2, 1 << 20}) {
			t.Errorf("with %v it is %+v, %v", options, img, err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range []int64{2, 8, 64} {
			if err := os.Truncate(path, info.Size()/part); err != nil {
				t.Fatal(err)
			}
			if img, err := check(t, path); !sandbox.Is(err, sandbox.Invalid) {
				t.Errorf("with %v, 1/%d of it is %+v, %v", options, part, img, err)
			}
		}
	}
}

func TestADiskIsToldFromAnArchive(t *testing.T) {
	gpt, tar := make([]byte, headLength), make([]byte, headLength)
	copy(gpt[512:], "EFI PART")
	copy(tar, "QFI-is-a-file")
	copy(tar[257:], "ustar")
	copy(tar[510:], "\x55\xaa")
	boot, err := os.ReadFile(disk(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		data []byte
		want bool
	}{
		"boot sector": {boot, true}, "partitions": {gpt, true}, "qcow2": {[]byte(qcowMagic), true}, "vmdk": {[]byte("KDMV"), true},
		"tar": {tar, false}, "nothing": {nil, false}, "zeros": {make([]byte, 4096), false}, "text": {[]byte(strings.Repeat("text\n", 1000)), false},
	} {
		if got := Recognize(bytes.NewReader(c.data)); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func FuzzCheck(f *testing.F) {
	path := filepath.Join(f.TempDir(), "disk.qcow2")
	qemuImg(f, "convert", "-O", "qcow2", "-o", "cluster_size=512", disk(f), path)
	data, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data[:64<<10])
	f.Add([]byte(qcowMagic))
	f.Fuzz(func(t *testing.T, data []byte) {
		Recognize(bytes.NewReader(data))
		img, err := Check(bytes.NewReader(data), int64(len(data)))
		if err == nil && (img.Size <= 0 || img.Size > MaxSize) {
			t.Fatalf("a disk of %d bytes", img.Size)
		}
	})
}
