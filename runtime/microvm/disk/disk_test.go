package disk

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf16"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/image/fulldisk"
	"github.com/atoll-run/atoll/sandbox"
)

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := findTool(name)
	if err != nil {
		t.Fatalf("scripts/deps installs %s: %v", name, err)
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

func TestAnEmptyFileSystemIsMadeOnceAndIsSound(t *testing.T) {
	dir := t.TempDir()
	path, err := Empty(t.Context(), dir, 10<<30)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != 10<<30 || st.Blocks*512 > 8<<20 {
		t.Errorf("the image has %d bytes and takes %d", st.Size, st.Blocks*512)
	}
	t.Logf("measured: FR2.5 an empty file system of 10 GiB takes %d KiB", st.Blocks/2)
	run(t, "fsck.ext4", "-n", "-f", path)
	again, err := Empty(t.Context(), dir, 10<<30-1)
	if err != nil || again != path {
		t.Errorf("the same size is %q, %v", again, err)
	}
	other, err := Empty(t.Context(), t.TempDir(), 10<<30)
	if err != nil {
		t.Fatal(err)
	}
	a, b := make([]byte, 4<<20), make([]byte, 4<<20)
	for name, buf := range map[string][]byte{path: a, other: b} {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.ReadAt(buf, 0); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	if !bytes.Equal(a, b) {
		t.Error("two file systems of one size differ")
	}
}

func TestALayerIsWhatQEMUTakesForOne(t *testing.T) {
	for _, size := range []int64{MinSize, 10 << 30, maxLayer} {
		path := filepath.Join(t.TempDir(), "layer")
		if err := MakeLayer(path, size); err != nil {
			t.Fatal(err)
		}
		img, err := fulldisk.Inspect(path)
		if err != nil || img != (fulldisk.Image{Format: fulldisk.QCOW2, Size: size}) {
			t.Errorf("the layer is %+v, %v", img, err)
		}
		if out := run(t, "qemu-img", "check", "-f", "qcow2", path); !strings.Contains(out, "No errors were found") {
			t.Errorf("qemu-img: %s", out)
		}
	}
	if err := MakeLayer(filepath.Join(t.TempDir(), "x"), maxLayer+1); !sandbox.Is(err, sandbox.Invalid) {
		t.Errorf("a layer that is too big: %v", err)
	}
}

func TestASeedIsFoundByItsLabelAndHasItsFiles(t *testing.T) {
	meta, err := MetaData("i-1", `na"me`)
	if err != nil {
		t.Fatal(err)
	}
	network, err := NetworkConfig(wire.MachineNetwork{
		MAC: "52:54:00:00:00:01", Address: netip.MustParsePrefix("10.0.0.2/30"), MTU: 1400,
		Gateway: netip.MustParseAddr("10.0.0.1"), Resolver: netip.MustParseAddr("10.0.0.1"),
	})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"user-data": "#cloud-config\n" + strings.Repeat("# long\n", 1000), "meta-data": string(meta), "network-config": string(network),
	}
	path := filepath.Join(t.TempDir(), "seed.iso")
	if err := WriteSeed(path, Seed{UserData: []byte(want["user-data"]), MetaData: meta, NetworkConfig: network}); err != nil {
		t.Fatal(err)
	}
	if out := run(t, "blkid", "-p", "-o", "export", path); !strings.Contains(out, "LABEL=cidata\n") || !strings.Contains(out, "TYPE=iso9660\n") {
		t.Errorf("blkid takes it for %s", out)
	}
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, root := range []struct {
		volume int
		decode func([]byte) string
	}{
		{16, func(b []byte) string { return strings.ToLower(strings.TrimSuffix(string(b), ".;1")) }},
		{17, func(b []byte) string {
			var units []uint16
			for i := 0; i+1 < len(b); i += 2 {
				units = append(units, binary.BigEndian.Uint16(b[i:]))
			}
			return string(utf16.Decode(units))
		}},
	} {
		got := listing(image, root.volume, root.decode)
		if len(got) != len(want) {
			t.Errorf("volume descriptor %d has %d files", root.volume, len(got))
		}
		for name, content := range want {
			if got[name] != content {
				t.Errorf("by volume descriptor %d, %s is %q", root.volume, name, got[name])
			}
		}
	}
	if err := WriteSeed(path, Seed{UserData: make([]byte, maxSeed+1)}); !sandbox.Is(err, sandbox.Invalid) {
		t.Errorf("a seed that is too big: %v", err)
	}
}

// listing reads the files of an image by one of its volume descriptors.
func listing(image []byte, volume int, decode func([]byte) string) map[string]string {
	le := binary.LittleEndian
	root := image[volume*2048+156:]
	dir := image[le.Uint32(root[2:])*2048:][:le.Uint32(root[10:])]
	files := map[string]string{}
	for dir[0] != 0 {
		rec := dir[:dir[0]]
		dir = dir[dir[0]:]
		if rec[25]&2 == 0 {
			data := image[le.Uint32(rec[2:])*2048:][:le.Uint32(rec[10:])]
			files[decode(rec[33:33+rec[32]])] = string(data)
		}
	}
	return files
}
