package kernel_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/runtime/microvm/disk"
	"github.com/atoll-run/atoll/runtime/microvm/kernel"
	"github.com/atoll-run/atoll/runtime/microvm/microvmtest"
)

func TestMain(m *testing.M) { os.Exit(microvmtest.Main(m)) }

// overlay makes a machine's disks and returns QEMU's arguments for them.
func overlay(t *testing.T, size int64) []string {
	t.Helper()
	empty, err := disk.Empty(t.Context(), t.TempDir(), size)
	if err != nil {
		t.Fatal(err)
	}
	layer := filepath.Join(t.TempDir(), "layer.qcow2")
	if err := disk.MakeLayer(layer, disk.Round(size)); err != nil {
		t.Fatal(err)
	}
	return slices.Concat(microvmtest.Disk("root", "raw", microvmtest.Root(t), true), []string{
		"-blockdev", "driver=file,node-name=empty,filename=" + empty + ",read-only=on",
		"-blockdev", "driver=qcow2,node-name=layer,discard=unmap,backing=empty,file.driver=file,file.filename=" + layer,
		"-device", "virtio-blk-device,drive=layer",
	})
}

// conformance: NFR1.1-2
func TestAMachineBootsTheDistributionsKernelIntoItsRoot(t *testing.T) {
	k := microvmtest.Kernel(t)
	began := time.Now()
	m := microvmtest.Start(t, slices.Concat(microvmtest.MicroVM(), microvmtest.Boot(k.Vmlinux, k.Initramfs, kernel.Args), overlay(t, 64<<20),
		[]string{"-netdev", "hubport,id=net,hubid=0", "-device", "virtio-net-device,netdev=net"}))
	m.Connect()
	t.Logf("measured: FR4.1 cold boot %d ms (TCG)", time.Since(began).Milliseconds())
	began = time.Now()
	if err := m.Agent.Health(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("measured: FR4.1 ping of the agent %d us", time.Since(began).Microseconds())
	if got := strings.TrimSpace(m.Shell("uname -r")); got != k.Version {
		t.Errorf("uname -r says %q, the kernel is %q", got, k.Version)
	}
	t.Log(m.Shell("cat /proc/uptime; cat /proc/mounts"))
	if got := m.Shell("echo hello > /kept; rm -f /etc/group; cat /kept"); got != "hello\n" {
		t.Errorf("a file that was written holds %q", got)
	}
	if got := m.Shell("dd if=/dev/zero of=/big bs=1M count=100 2>&1 | grep -c 'No space left' ; rm /big"); got != "1\n" {
		t.Errorf("writing more than the disk holds says %q", got)
	}
	identify(t, m)
	var layer bytes.Buffer
	if err := m.Maker.Changes(t.Context(), &layer); err != nil {
		t.Fatal(err)
	}
	var names []string
	for r := tar.NewReader(&layer); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
	if want := []string{"etc/", "etc/.wh.group", "kept"}; !slices.Equal(names, want) {
		t.Errorf("the machine's changes are %q, want %q", names, want)
	}
}

// identify gives the machine another identity and looks whether it took it.
func identify(t *testing.T, m *microvmtest.Machine) {
	t.Helper()
	then := time.Date(2040, 5, 6, 7, 8, 9, 0, time.UTC)
	in := wire.Machine{
		Time: then, Entropy: bytes.Repeat([]byte("seed"), 16), Hostname: "other",
		Network: &wire.MachineNetwork{
			MAC: "52:54:00:12:34:99", Address: netip.MustParsePrefix("10.1.2.3/24"), MTU: 1400,
			Gateway: netip.MustParseAddr("10.1.2.1"), Resolver: netip.MustParseAddr("10.1.2.1"),
		},
	}
	for range 2 { // the second time it is a change, as in a fork
		began := time.Now()
		question, err := in.AppendBinary(nil)
		if err != nil {
			t.Fatal(err)
		}
		if answer, err := m.Port.Ask(t.Context(), question); err != nil || len(answer) > 0 {
			t.Fatalf("%q, %v", answer, err)
		}
		t.Logf("measured: FR5.2 another identity within %d us", time.Since(began).Microseconds())
		in.Network.Address = netip.MustParsePrefix("10.1.3.4/30")
		in.Network.Gateway = netip.MustParseAddr("10.1.3.5")
	}
	got := m.Shell("uname -n; date -u +%Y-%m-%d; cat /etc/resolv.conf; cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; cat /proc/net/fib_trie; cat /proc/net/route")
	for _, want := range []string{"other\n", "2040-05-06\n", "nameserver 10.1.2.1\n", "52:54:00:12:34:99\n1400\n", "10.1.3.4\n", "eth0\t00000000\t0503010A"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in what the machine says: %s", want, got)
		}
	}
	if strings.Contains(got, "10.1.2.3") {
		t.Errorf("the earlier address is still there: %s", got)
	}
}
