// Package sandbox says what a sandbox is: the nouns that every other package
// speaks of, the contract that every runtime keeps, and the few kinds of error
// and event that cross it. It imports nothing of ours and does nothing itself.
package sandbox

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// GuestPort is the port on which the guest agent answers inside every sandbox.
// It is the port on which E2B's SDKs look for envd.
const GuestPort = 49983

// State is where a sandbox is in its life.
//
//	pending ─▶ creating ─▶ running ◀─▶ paused
//	                │          │          │
//	                ▼          ▼          ▼
//	              error   terminating ─▶ terminated
//
// Pending, Terminating and Terminated belong to the node, which knows what was
// asked for; a runtime reports Creating, Running, Paused or Error only.
type State string

// The states of a sandbox.
const (
	Pending     State = "pending"     // accepted, nothing exists yet
	Creating    State = "creating"    // the runtime is at work
	Running     State = "running"     // the guest answers
	Paused      State = "paused"      // frozen, in memory or on disk; nothing runs
	Terminating State = "terminating" // being removed
	Terminated  State = "terminated"  // gone; only the record is left
	Error       State = "error"       // lost or failed; the reason is in the last event
)

// RootKind says how a runtime obtains a sandbox's root file system.
type RootKind string

// The kinds of root.
const (
	// RootEROFS is a read-only EROFS file; writes go to an overlay of the
	// sandbox's own.
	RootEROFS RootKind = "erofs"
	// RootHost is the host's own /usr, read-only, with a fresh /etc, /home,
	// /tmp and /var.
	RootHost RootKind = "host"
	// RootRepository is a git working tree; Path is the repository. Inside, the
	// tree is at RepositoryDir.
	RootRepository RootKind = "repository"
	// RootDisk is a whole disk, raw or qcow2, with a boot loader and a kernel of
	// its own; writes go to a layer of the sandbox's own upon it.
	RootDisk RootKind = "disk"
)

// RepositoryDir is where a sandbox with a RootRepository finds its working tree.
const RepositoryDir = "/work"

// Root is the file system that a sandbox starts from. It is never written.
type Root struct {
	Kind   RootKind `json:"kind"`
	Path   string   `json:"path,omitempty"`   // host path; empty for RootHost
	Digest string   `json:"digest,omitempty"` // "blake3:hex" of an EROFS file or a disk; a commit for a repository
}

// Resources bounds what a sandbox may take of its host. Zero means the
// runtime's default, which is never "without limit" for Pids.
type Resources struct {
	CPUs   float64 `json:"cpus,omitempty"`   // cores, may be a fraction
	Memory int64   `json:"memory,omitempty"` // bytes, of the guest's memory and its in-memory files
	Disk   int64   `json:"disk,omitempty"`   // bytes that the sandbox may write to its root
	Pids   int     `json:"pids,omitempty"`   // processes and threads
}

// Or fills what r leaves zero from d.
func (r Resources) Or(d Resources) Resources {
	return Resources{
		CPUs: cmp.Or(r.CPUs, d.CPUs), Memory: cmp.Or(r.Memory, d.Memory),
		Disk: cmp.Or(r.Disk, d.Disk), Pids: cmp.Or(r.Pids, d.Pids),
	}
}

// NetworkMode is how much network a sandbox has.
type NetworkMode string

// The network modes.
const (
	NetworkNone    NetworkMode = "none"    // loopback only
	NetworkSandbox NetworkMode = "sandbox" // an address of its own, policy enforced; the default
	NetworkHost    NetworkMode = "host"    // the host's network: trusted code only
)

// NetworkPolicy says what a sandbox in NetworkSandbox may reach. Other
// sandboxes, the host and private ranges are denied unless AllowOut names them;
// the rest of the internet is allowed unless Internet is false or DenyOut names it.
// An entry of AllowOut beats every entry of DenyOut, as in E2B's API.
type NetworkPolicy struct {
	Internet bool     `json:"internet"`           // false: only AllowOut
	AllowOut []string `json:"allowOut,omitempty"` // CIDRs, addresses, domains, "*.domain"
	DenyOut  []string `json:"denyOut,omitempty"`  // CIDRs or addresses
	// RateLimit is how many bytes a second the sandbox may send, and as many it may
	// receive; 0: no limit.
	RateLimit int64 `json:"rateLimit,omitempty"`
}

// Link is a sandbox's own attachment to the network, made before the sandbox
// and removed after it. The interface inside NetNS already has the address.
type Link struct {
	NetNS   string       `json:"netns"`   // path of the network namespace
	Device  string       `json:"device"`  // interface name inside NetNS
	Address netip.Prefix `json:"address"` // the sandbox's address
	Gateway netip.Addr   `json:"gateway"` // also the resolver of names
}

// Mount puts a host directory or an EROFS file into a sandbox.
type Mount struct {
	Source   string `json:"source"` // host path
	Target   string `json:"target"` // absolute path inside
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// Boot says how a sandbox with a RootDisk comes up, whose own system starts first.
type Boot struct {
	// UserData is cloud-init's: "#cloud-config", a script, or what else it takes;
	// empty: none.
	UserData []byte `json:"userData,omitempty"`
	// NetworkConfig is cloud-init's, in place of the one that gives the machine the
	// sandbox's address; empty: that one.
	NetworkConfig []byte `json:"networkConfig,omitempty"`
	// NoAgent leaves the guest agent out. Then the sandbox is there as soon as its
	// machine is, nobody waits for its system, and what needs the agent is
	// Unsupported; its ports are reached by its network alone.
	NoAgent bool `json:"noAgent,omitempty"`
	// Timeout is within which time the agent must answer; 0: the runtime's default.
	Timeout time.Duration `json:"timeout,omitempty"`
}

// Spec is everything that a runtime needs to make a sandbox. It is a value: a
// runtime keeps a copy and nothing outside changes it.
type Spec struct {
	ID        string            `json:"id"` // ^[a-z0-9]+$, see NewID
	Root      Root              `json:"root"`
	Hostname  string            `json:"hostname,omitempty"` // default: the ID
	Resources Resources         `json:"resources"`
	Network   NetworkMode       `json:"network"`
	Link      *Link             `json:"link,omitempty"` // nil unless Network is NetworkSandbox
	Mounts    []Mount           `json:"mounts,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"` // runtime-specific hints, e.g. "worktree.branch"
	Boot      *Boot             `json:"boot,omitempty"`   // nil unless Root is a RootDisk, and there may be nil: all defaults
}

// HasAgent reports whether a guest agent answers in the sandbox.
func (s Spec) HasAgent() bool { return s.Boot == nil || !s.Boot.NoAgent }

// Clone returns a copy that shares nothing with s.
func (s Spec) Clone() Spec {
	s.Labels = maps.Clone(s.Labels)
	s.Mounts = slices.Clone(s.Mounts)
	if s.Link != nil {
		link := *s.Link
		s.Link = &link
	}
	if s.Boot != nil {
		boot := *s.Boot
		boot.UserData, boot.NetworkConfig = slices.Clone(boot.UserData), slices.Clone(boot.NetworkConfig)
		s.Boot = &boot
	}
	return s
}

// Status is what a runtime knows of one sandbox.
type Status struct {
	ID     string `json:"id"`
	State  State  `json:"state"`
	Reason string `json:"reason,omitempty"` // why State is Error; empty otherwise
	Spec   Spec   `json:"spec"`
}

// Stats is what a sandbox uses of its host, read at one moment.
type Stats struct {
	Time        time.Time     `json:"time"`
	CPU         time.Duration `json:"cpu"`         // consumed since the sandbox began
	Memory      int64         `json:"memory"`      // bytes resident, the runtime's own overhead included
	MemoryLimit int64         `json:"memoryLimit"` // bytes; 0: no limit
	Disk        int64         `json:"disk"`        // bytes written to the root
	DiskLimit   int64         `json:"diskLimit"`   // bytes; 0: no limit
	Pids        int           `json:"pids"`
	RxBytes     int64         `json:"rxBytes"` // received by the sandbox
	TxBytes     int64         `json:"txBytes"` // sent by the sandbox
}
