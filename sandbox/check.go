package sandbox

import (
	"path"
	"path/filepath"
	"slices"
)

// MaxBootData bounds user data and network configuration of a Boot, in bytes each.
const MaxBootData = 256 << 10

// Check reports whether a runtime with these capabilities can make a sandbox of
// the spec: Invalid when the spec makes no sense for any runtime, Unsupported
// when it asks for what is not declared. It looks at nothing but its arguments;
// op is named in the error.
func (c Capabilities) Check(op string, spec Spec) error {
	invalid := func(format string, args ...any) error { return Errorf(op, Invalid, spec.ID, format, args...) }
	unsupported := func(format string, args ...any) error { return Errorf(op, Unsupported, spec.ID, format, args...) }
	r := spec.Resources
	switch {
	case !ValidID(spec.ID):
		return invalid("%q is not a sandbox ID (lower-case letters and digits, at most 40)", spec.ID)
	case !(r.CPUs >= 0 && r.CPUs < 1e6) || r.Memory < 0 || r.Disk < 0 || r.Pids < 0: // NaN fails too
		return invalid("resources are negative or absurd: %+v", r)
	case !slices.Contains([]RootKind{RootEROFS, RootHost, RootRepository, RootDisk}, spec.Root.Kind):
		return invalid("unknown kind of root %q", spec.Root.Kind)
	case !slices.Contains(c.Roots, spec.Root.Kind):
		return unsupported("a root of kind %q", spec.Root.Kind)
	case !slices.Contains([]NetworkMode{NetworkNone, NetworkSandbox, NetworkHost}, spec.Network):
		return invalid("unknown network mode %q", spec.Network)
	case !slices.Contains(c.Networks, spec.Network):
		return unsupported("network mode %q", spec.Network)
	case spec.Network == NetworkSandbox && spec.Link == nil:
		return invalid("network mode %q needs a link", spec.Network)
	case spec.Boot != nil && spec.Root.Kind != RootDisk:
		return invalid("only a disk image has a boot of its own to be told how: its root is of kind %q", spec.Root.Kind)
	case spec.Boot != nil && (spec.Boot.Timeout < 0 || len(spec.Boot.UserData) > MaxBootData || len(spec.Boot.NetworkConfig) > MaxBootData):
		return invalid("user data and network configuration have at most %d bytes, and a time to boot is not negative", MaxBootData)
	case len(spec.Mounts) > 0 && !c.Mounts:
		return unsupported("mounts")
	}
	for _, m := range spec.Mounts {
		if !filepath.IsAbs(m.Source) {
			return invalid("mount source %q is not an absolute path", m.Source)
		}
		if !path.IsAbs(m.Target) || path.Clean(m.Target) != m.Target || m.Target == "/" {
			return invalid("mount target %q is not a clean absolute path below /", m.Target)
		}
	}
	return nil
}
