package microvm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/image/fulldisk"
	"github.com/atoll-run/atoll/runtime/microvm/disk"
	"github.com/atoll-run/atoll/runtime/microvm/vmm"
	"github.com/atoll-run/atoll/sandbox"
)

// A machine of a full disk image is one like all others, but that its first disk is
// the image with layers of its own upon it, from which it boots; that cloud-init,
// if the image has it, finds a seed; and that the agent, if there is to be one, comes
// with that seed. There is no template of it: it boots for each sandbox, and its
// snapshots have all of its memory.

// seedName is the file with what cloud-init is told.
const seedName = "seed.iso"

// The disks of such a machine besides the first, by serial number.
const (
	diskImage = "image"
	diskSeed  = "cidata"
	diskAgent = "atoll"
)

// bootTimeout is how long such a machine may take until its agent answers, unless
// its spec says otherwise. Emulated ones of common cloud images take minutes.
const bootTimeout = 10 * time.Minute

// ownDisk is the number of the disk that a machine writes to.
func (s shape) ownDisk() int {
	if s.PC {
		return 0
	}
	return 1
}

// keptLayers is how many of its own layers a machine never merges, which many have
// in common: a template's.
func (s shape) keptLayers() int {
	if s.PC {
		return 0
	}
	return 1
}

// fullDisks are the disks of a machine with layers upon an image.
func (r *Runtime) fullDisks(dir, image string, layers []string, s shape) ([]vmm.Disk, error) {
	img, err := fulldisk.Inspect(image) // once more, just before it is opened
	if err != nil {
		return nil, err
	}
	disks := []vmm.Disk{
		{Serial: diskImage, Layers: append([]string{image}, layers...), QCOW2: img.Format == fulldisk.QCOW2, Writable: true},
		{Serial: diskSeed, Layers: []string{filepath.Join(dir, seedName)}},
	}
	if s.Bare {
		return disks, nil
	}
	agent, err := disk.Agent(filepath.Join(r.cfg.Cache, "disk"), r.cfg.Guest)
	return append(disks, vmm.Disk{Serial: diskAgent, Layers: []string{agent}}), err
}

// checkDisk says why a spec of a full disk image cannot become a sandbox.
func checkDisk(op string, spec sandbox.Spec, res sandbox.Resources) error {
	if how := spec.Labels[LabelStart]; how != "" && how != StartCold {
		return sandbox.Errorf(op, sandbox.Unsupported, spec.ID, "label %s=%s: a full disk image boots for each machine", LabelStart, how)
	}
	img, err := fulldisk.Inspect(spec.Root.Path)
	if err != nil {
		return sandbox.E(op, "", spec.ID, err)
	}
	const mib = 1 << 20
	if size := disk.Round(res.Disk); size < img.Size || size > fulldisk.MaxSize {
		return sandbox.Errorf(op, sandbox.Invalid, spec.ID, "a disk of %d MiB; the image's has %d MiB, and it can grow to %d", res.Disk/mib, (img.Size+mib-1)/mib, int64(fulldisk.MaxSize)/mib).
			WithHint("leave --disk out, or ask for as much as the image's has")
	}
	return nil
}

// writeSeed writes what cloud-init in a machine in dir is told, if it is one of a
// full disk image. A machine that comes from a snapshot has another seed than the
// one that it had: should it boot again, it is a new instance.
func writeSeed(dir string, spec sandbox.Spec) error {
	if spec.Root.Kind != sandbox.RootDisk {
		return nil
	}
	name := spec.Hostname
	if name == "" {
		name = spec.ID
	}
	meta, err := disk.MetaData(spec.ID, name)
	if err != nil {
		return err
	}
	s := disk.Seed{MetaData: meta}
	if b := spec.Boot; b != nil {
		s.UserData, s.NetworkConfig = b.UserData, b.NetworkConfig
	}
	if len(s.NetworkConfig) == 0 {
		if s.NetworkConfig, err = networkConfig(spec.Link); err != nil {
			return err
		}
	}
	if spec.HasAgent() {
		s.VendorData = disk.AgentData
	}
	return disk.WriteSeed(filepath.Join(dir, seedName), s)
}

// networkConfig gives a machine the address of its link; nil without one, when it has
// no device that could have any.
func networkConfig(link *sandbox.Link) ([]byte, error) {
	if link == nil {
		return nil, nil
	}
	mtu, err := linkMTU(link)
	if err != nil {
		return nil, err
	}
	return disk.NetworkConfig(wire.MachineNetwork{
		MAC: guestMAC.String(), MTU: mtu, Address: link.Address, Gateway: link.Gateway, Resolver: link.Gateway,
	})
}

// freshDisk starts the machine of a sandbox that has nothing of its own yet. It has no
// network before it is joined with its link, so it is not waited for here.
func (r *Runtime) freshDisk(ctx context.Context, b *box, spec sandbox.Spec) (*vm, error) {
	o := b.Record().Origin
	o.Layers = []string{layerName(0)}
	b.Record().Origin = o // nobody else knows the box yet
	if err := disk.MakeLayer(filepath.Join(b.Dir, layerName(0)), o.Shape.Disk); err != nil {
		return nil, err
	}
	if err := writeSeed(b.Dir, spec); err != nil {
		return nil, err
	}
	memory, err := vmm.NewMemory(o.Shape.Memory)
	if err != nil {
		return nil, err
	}
	defer memory.Close()
	return r.spawn(ctx, b.Dir, spec.ID, spec.Root.Path, o, memory, booting)
}

// settleDisk waits until the agent of a machine that boots answers, and tells it what
// cloud-init did not: all of its identity, if the machine was restored.
func (r *Runtime) settleDisk(ctx context.Context, rec *record, v *vm, mtu int) error {
	switch {
	case v.bare:
		return nil
	case len(rec.Origin.Base) > 0:
		return v.identify(ctx, rec.Spec, 0, mtu)
	}
	timeout := bootTimeout
	if b := rec.Spec.Boot; b != nil && b.Timeout > 0 {
		timeout = b.Timeout
	}
	if err := v.awaitBoot(ctx, timeout); err != nil {
		return err
	}
	in := wire.Machine{Time: time.Now(), Entropy: make([]byte, 64)}
	_, _ = rand.Read(in.Entropy) // never fails since Go 1.24
	return v.tell(ctx, in)
}

// bootPause is after how long a guest is asked again whose answer was cut off, as by a
// start anew.
const bootPause = 500 * time.Millisecond

// awaitBoot returns when the agent answers. When it does not, the error has what the
// console said last.
func (v *vm) awaitBoot(ctx context.Context, timeout time.Duration) error {
	waiting, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		_, err := v.reachWithin(waiting, timeout)
		if err == nil {
			return nil
		}
		select {
		case <-v.machine.Ended():
			return sandbox.Errorf("boot the image", sandbox.Unavailable, "", "%s before its agent answered%s", v.Cause(), v.lastLines(ctx))
		default:
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if waiting.Err() != nil {
			return sandbox.Errorf("boot the image", sandbox.Timeout, "", "the agent did not answer within %v%s", timeout, v.lastLines(ctx)).
				WithHint("give it longer with --boot-timeout; an image without cloud-init runs with --no-agent")
		}
		if err := sleep(waiting, bootPause); err != nil {
			continue // the time is over, which is said above
		}
	}
}

// lastLines is what the console said last, for an error; empty when it said nothing.
func (v *vm) lastLines(ctx context.Context) string {
	words, err := v.machine.Console(context.WithoutCancel(ctx))
	if err != nil || len(words) == 0 {
		return "; its console said nothing"
	}
	return "; its console said last:\n" + strings.Join(tail(words), "\n")
}

// mustTell fails with Unsupported for what a machine without the agent cannot do, since
// nobody in it could be told of it.
func (v *vm) mustTell(op string) error {
	if !v.bare {
		return nil
	}
	return sandbox.Errorf(op, sandbox.Unsupported, "", "the machine runs without the guest agent").
		WithHint("make it without --no-agent; what it says is in `atoll logs`, and its ports are reached over its network")
}

// dialLink opens a connection to a port of a machine without the agent.
func (v *vm) dialLink(ctx context.Context, port int) (net.Conn, error) {
	if port == sandbox.GuestPort {
		return nil, v.mustTell("reach guest")
	}
	if v.link == nil {
		return nil, sandbox.Errorf("reach guest", sandbox.Unsupported, "", "the machine has neither the guest agent nor a network")
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(v.link.Address.Addr().String(), strconv.Itoa(port)))
	if err != nil {
		return nil, v.explain(sandbox.E("reach guest", sandbox.Unavailable, "", errors.Join(fmt.Errorf("port %d", port), err)))
	}
	return conn, nil
}
