// Package orders is what the runtime and a sentry say to each other: how a sentry
// is started and the calls over its control socket.
//
// The runtime is part of every program that uses sandboxes, the sentry is a
// program of its own with all of gVisor in it. This package lets the first do
// without the second. Arguments of gVisor's own calls are therefore described
// here again, by the names that they have on the socket; a test of the sentry
// holds them to gVisor's.
package orders

import (
	"net"
	"strings"

	"gvisor.dev/gvisor/pkg/urpc"
)

// The names under which the sentry's executable is started.
const (
	ArgSentry = "atoll-sentry"
	ArgGofer  = "atoll-gofer"
)

// EnvFiles is the variable that says how many files the executable is given, from descriptor 3 on.
const EnvFiles = "ATOLL_FILES"

// ContainerID is the name of the one container in every sentry. It is the same
// everywhere, so that a snapshot can be restored under any sandbox ID.
const ContainerID = "atoll"

// The calls. Those of Inside are ours, the others gVisor's.
const (
	CallNetwork   = "containerManager.SetNetworkArgs" // Network
	CallStart     = "containerManager.StartRoot"      // the container's ID
	CallRestore   = "containerManager.Restore"        // Restore
	CallPause     = "containerManager.Pause"
	CallResume    = "containerManager.Resume"
	CallProcesses = "containerManager.Processes" // the container's ID; answers []Process
	CallChanges   = "Fs.TarRootfsUpperLayer"     // Changes
	CallConnect   = "Inside.Connect"             // Connect
	CallSave      = "Inside.Save"                // Save
	CallIdentify  = "Inside.Identify"            // Identify
)

// StateFiles are what Save writes and Restore reads, in the order of their
// files: the kernel's state, where the pages lie, and the pages themselves.
var StateFiles = []string{"checkpoint.img", "pages_meta.img", "pages.img"}

// Uncompressed is the Metadata of a Save whose pages can be read while the
// restored sandbox runs already.
var Uncompressed = map[string]string{"compression": "none"}

// The values of gVisor's enumerations that we use.
const (
	QueueFIFO      = 1       // FDLink.QDisc
	MaxSegmentSize = 1 << 16 // FDLink.GSOMaxSize, in bytes
)

// Network says what the sentry's network stack is made of. Files are the raw
// sockets of FDBasedLinks.
type Network struct {
	urpc.FilePayload
	LoopbackLinks    []Loopback
	FDBasedLinks     []FDLink
	Defaultv4Gateway DefaultRoute
	IsRestore        bool
}

// Loopback is a loopback device.
type Loopback struct {
	Name      string
	Addresses []Address
	Routes    []Route
}

// FDLink is a device whose packets go through a raw socket.
type FDLink struct {
	Name              string
	MTU               int
	Addresses         []Address
	Routes            []Route
	GSOMaxSize        uint32
	GVisorGSOEnabled  bool
	RXChecksumOffload bool
	LinkAddress       net.HardwareAddr
	QDisc             int
	NumChannels       int
}

// Address is an address with the length of its network's prefix.
type Address struct {
	Address   net.IP
	PrefixLen int
}

// Route is where packets to a network go.
type Route struct {
	Destination net.IPNet
	Gateway     net.IP
}

// DefaultRoute is where all other packets go.
type DefaultRoute struct {
	Route Route
	Name  string // of the device
}

// LocalLink is the loopback device of every sandbox.
var LocalLink = Loopback{
	Name: "lo",
	Addresses: []Address{
		{Address: net.IPv4(127, 0, 0, 1).To4(), PrefixLen: 8},
		{Address: net.IPv6loopback, PrefixLen: 128},
	},
	Routes: []Route{
		{Destination: net.IPNet{IP: net.IPv4(127, 0, 0, 0), Mask: net.IPv4Mask(255, 0, 0, 0)}},
		{Destination: net.IPNet{IP: net.IPv6loopback, Mask: net.CIDRMask(128, 128)}},
	},
}

// Restore asks for the state in StateFiles.
type Restore struct {
	urpc.FilePayload
	HavePagesFile bool
	Background    bool // read pages while the sandbox runs
}

// Save asks for a checkpoint into StateFiles.
type Save struct {
	Metadata      map[string]string `json:"metadata"`
	HavePagesFile bool              `json:"have_pages_file"`
	urpc.FilePayload
	Resume bool // go on afterwards
}

// Changes asks for what was written to the root, as a tar stream into its one file.
type Changes struct {
	ContainerID string
	urpc.FilePayload
}

// Process is one process of the sandbox.
type Process struct {
	Threads []int32 `json:"threads"`
}

// Connect asks for a connection of a socket to a port of the sandbox.
type Connect struct {
	urpc.FilePayload // the sentry's end of a pair of non-blocking stream sockets
	Port             uint16
}

// Identify is what tells one sandbox from another that began alike.
type Identify struct {
	Hostname string
	Files    map[string]string // content by absolute path
}

// MountConf says how one of the files that the sentry got at its start is mounted.
type MountConf struct {
	Lower Lower
	Size  string // limit of an overlay in bytes; empty: no overlay, read-only as far as Lower is
}

// Lower is what a mount shows.
type Lower string

// The kinds of mount.
const (
	LowerImage Lower = "erofs"  // an EROFS image
	LowerGofer Lower = "lisafs" // host files, through the gofer
)

// MountFlag is the flag that carries confs to the sentry and the gofer.
func MountFlag(confs []MountConf) string {
	words := make([]string, len(confs))
	for i, c := range confs {
		words[i] = string(c.Lower) + ":none"
		if c.Size != "" {
			words[i] = string(c.Lower) + ":anon:size=" + c.Size
		}
	}
	return "--gofer-mount-confs=" + strings.Join(words, ",")
}
